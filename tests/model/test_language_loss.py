"""The fused language-modelling loss computes what the plain one does; Triton's interpreter runs it without a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from tiny_models import random_images, random_tokens, tiny_cascaded, tiny_hive

from hive_ds.constants import IGNORE_INDEX
from hive_ds.errors import HiveError
from hive_ds.model import language_loss
from hive_ds.model.language_loss import describe_loss

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="needs Liger-Kernel: pip install 'hive-ds[liger]'"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batch(labels_from: int) -> dict[str, Any]:
    """Two samples of 9 and 6 tokens and an image; those from ``labels_from`` on carry loss."""
    ids = random_tokens(15)
    labels = ids.clone()
    labels[:labels_from] = IGNORE_INDEX
    inputs = {"input_ids": ids, "labels": labels, "pixel_values": random_images(1)}
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    return {**inputs, "text_lengths": [9, 6], "image_offsets": [[1], []]}


def loss_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, num_items_in_batch=7).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_liger
@pytest.mark.parametrize("kind", ["hive", "cascaded"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("labels_from", [2, 15])
def test_fused_is_plain(kind: str, tied: bool, frozen: bool, labels_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make = tiny_hive if kind == "hive" else tiny_cascaded
    model = make(text_changes={"tie_word_embeddings": tied}).to(DEVICE)
    model.language_model.requires_grad_(not frozen)
    inputs = batch(labels_from)
    model.language_loss.backend = "plain"
    plain, wanted = loss_and_gradients(model, inputs)
    model.language_loss.backend = "liger"
    fused, found = loss_and_gradients(model, inputs)
    assert fused.dtype == torch.float32
    assert bool(fused) == (labels_from < 15)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(language_loss, "LOGITS_BYTES", 1)  # in many pieces
    pieces, in_pieces = loss_and_gradients(model, inputs)
    torch.testing.assert_close(pieces, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_pieces, wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, num_items_in_batch=7).loss, plain, rtol=1e-5, atol=1e-6)


@needs_liger
@pytest.mark.parametrize(("room", "copies"), [(10, 10), (0.5, 1)])
def test_pieces_of_logits_fill_the_room(monkeypatch: pytest.MonkeyPatch, room: float, copies: int) -> None:
    """In copies of the hidden states, as Liger-Kernel counts; never less than one."""
    from liger_kernel.ops import fused_linear_cross_entropy as liger

    loss, hidden = tiny_hive().to(DEVICE).language_loss, torch.randn(7, 48, device=DEVICE)
    loss.backend = "liger"
    given, forward = [], liger.fused_linear_cross_entropy_forward
    monkeypatch.setattr(
        liger,
        "fused_linear_cross_entropy_forward",
        lambda **named: given.append(named["chunk_mem_const"]) or forward(**named),
    )
    monkeypatch.setattr(language_loss, "LOGITS_BYTES", int(room * hidden.nbytes))
    loss(hidden, torch.arange(7, device=DEVICE))
    assert given == [copies]


def test_what_cannot_be_fused_is_plain_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, gpu = tiny_hive().language_loss, torch.device("cuda")
    assert describe_loss(loss, torch.device("cpu")) == "language-modelling loss: plain (the device is cpu)"
    monkeypatch.setattr(language_loss, "_missing", lambda: "it is not there")
    assert loss.choose(gpu) == ("plain", "it is not there")
    loss.backend = "liger"
    with pytest.raises(HiveError, match=r"model\.language_loss is 'liger', but it is not there"):
        loss.choose(torch.device("cpu"))
    monkeypatch.setattr(language_loss, "_missing", lambda: None)
    monkeypatch.setattr(language_loss, "INTERPRETED", False)
    with pytest.raises(HiveError, match=r"model\.language_loss is 'liger', but the device is cpu; expected a GPU"):
        loss.choose(torch.device("cpu"))
    assert loss.choose(gpu) == ("liger", "asked for")
    llm = tiny_hive().language_model
    llm.config.final_logit_softcapping = 30.0
    capped = language_loss.LanguageLoss(llm)
    assert capped.choose(gpu) == ("plain", "the language model changes its logits by final_logit_softcapping")
    assert list(capped.state_dict()) == list(capped.parameters()) == []
