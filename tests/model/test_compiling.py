"""Compiled blocks: the same loss and gradients, one compilation for all layers, none for new lengths."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from tiny_models import random_images, random_tokens, tiny_cascaded, tiny_hive
from torch._dynamo.utils import counters
from varlen_on_cpu import serve_on_cpu

from hive_ds.analysis.attention_maps import token_attention_maps
from hive_ds.analysis.block_gradients import watched_gradients
from hive_ds.benchmarks.padded_ways import PaddedCascade, PaperWay
from hive_ds.data.batch import PackedBatch
from hive_ds.kernels import tiles
from hive_ds.model.attention import AttentionCall
from hive_ds.model.compiling import compile_blocks
from hive_ds.training.parts import shares_of, traced

BACKENDS = (
    "aot_eager",  # what is compiled when does not depend on the backend, and this one needs no C++ compiler
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.long,
            pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: apt-get install g++"),
        ],
    ),
)


def batch(lengths: list[int]) -> PackedBatch:
    """An image before each text."""
    ids = random_tokens(sum(lengths), seed=sum(lengths))
    images = {"pixel_values": random_images(len(lengths))}
    return PackedBatch(
        ids, ids.clone(), lengths, [[0] for _ in lengths], images, [str(n) for n in lengths], len(lengths)
    )


def loss_of(way: Any, one: PackedBatch) -> torch.Tensor:
    if hasattr(way, "loss"):
        return way.loss(one, torch.device("cpu"))
    return way(**one.model_inputs("cpu", torch.float32), num_items_in_batch=1).loss


LONG = (pytest.param(kind, marks=pytest.mark.long) for kind in ("cascaded", "paper", "padded cascade"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["hive", "triton", "flash", *LONG])
def test_new_lengths_compile_nothing(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    make = tiny_cascaded if "cascade" in kind else tiny_hive
    few = {"language_layers": (1,), "vision_blocks": (3,), "text_changes": {"num_hidden_layers": 3}}
    model = make(**(few if kind == "triton" else {})).train()  # interpreted: small
    if kind == "triton" and not tiles.INTERPRETED:
        pytest.skip("needs the Triton interpreter: TRITON_INTERPRET=1")
    if kind == "flash":
        serve_on_cpu()
    for layer in model.language_model.model.layers if kind in ("triton", "flash") else ():
        layer.self_attn.backend = "triton" if kind == "triton" else "auto" if layer.self_attn.routed else "torch_flash"
    way = {"paper": PaperWay, "padded cascade": PaddedCascade}.get(kind, lambda one: one)(model)
    first, later = ([5, 9], [7, 4, 11]), ([8, 8, 1], [4] * 7, [2, 9, 5, 3, 6], [11, 3])
    new = batch([3, 6, 2, 7])  # the same multiple of 16 slots: another one is another mask to the paper's way
    if kind == "triton":  # at first every text is one tile, and its backward pass one kernel
        first, later, new = ([2, 4], [3, 2, 5]), ([2, 2, 2, 2],), batch([3, 11])
    expected = loss_of(way, new)
    wanted = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    if way is model:
        compile_blocks(model, torch.device("cpu"), torch.float32, backend)
    else:
        way.compile(backend)
    for lengths in first:
        loss_of(way, batch(lengths)).backward()
    before = counters["stats"]["unique_graphs"]
    assert 0 < before <= 16
    # A layer that gives up for too many compilations makes no graph either: asking for another one must fail.
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = loss_of(way, new)
        gradients = torch.autograd.grad(found, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        for lengths in later:
            loss_of(way, batch(lengths)).backward()
    assert counters["stats"]["unique_graphs"] == before
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)


class Doubled(torch.nn.Module):
    """Stands in for an LLM layer."""

    def forward(self, hidden: torch.Tensor, *, hive: None) -> torch.Tensor:
        return hidden * 2


@pytest.mark.skipif(not tiles.INTERPRETED, reason="needs the Triton interpreter: TRITON_INTERPRET=1")
def test_runs_of_all_lengths_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten pieces of one function, five of training and five of validation: torch gives up after eight by default."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    model = tiny_hive()
    for layer in model.language_model.model.layers:
        layer.self_attn.backend = "triton"
    compile_blocks(model, torch.device("cpu"), torch.float32, "eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for training in (True, False):
            for count in range(1, 6):
                with torch.set_grad_enabled(training):
                    hidden = model.run_layers([Doubled() for _ in range(count)], torch.ones(1, 3, 4), [None] * count)
                assert torch.equal(hidden, torch.full((1, 3, 4), 2.0**count))
    assert counters["stats"]["unique_graphs"] == 10


def test_looking_inside_compiles_nothing() -> None:
    """Attention maps, gradients of blocks and the parts of a step's time hook into modules that are compiled."""
    torch._dynamo.reset()
    model = tiny_hive().train()
    one, ids, images = batch([5, 9]), random_tokens(6), {"pixel_values": random_images(1)}
    expected = token_attention_maps(model, ids[None], [2], images)
    with watched_gradients(model) as wanted:
        loss_of(model, one).backward()
    assert len(wanted) > 1
    compile_blocks(model, torch.device("cpu"), torch.float32, "aot_eager")
    for _ in range(2):
        loss_of(model, one).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = token_attention_maps(model, ids[None], [2], images)
        with watched_gradients(model) as squares:
            loss_of(model, one).backward()
        with traced(model, torch.device("cpu")) as trace:
            loss_of(model, one).backward()
        loss_of(model, one).backward()
    torch.testing.assert_close(squares, wanted)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.text_TT, other.text_TT)
        torch.testing.assert_close(layer.images, other.images)
    shares = shares_of(list(trace.events()), cuda=False)
    assert min(shares[part] for part in ("encoder", "projectors", "LLM", "attention of the LLM")) > 0


def test_answers_are_not_compiled() -> None:
    """A step with a cache is another shape every time."""
    torch._dynamo.reset()
    model = tiny_hive().eval()
    prompt = {"input_ids": random_tokens(4)[None], "image_offsets": [[1]], "pixel_values": random_images(1)}
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    expected = model.generate(**prompt, **options)
    compile_blocks(model, torch.device("cpu"), torch.float32, "aot_eager")
    model.generate(**prompt, **{**options, "max_new_tokens": 1})  # the encoder, without gradients
    before = counters["stats"]["unique_graphs"]
    assert torch.equal(model.generate(**prompt, **options), expected)
    assert counters["stats"]["unique_graphs"] == before


def test_what_a_layer_is_handed_is_not_read_by_the_compiler() -> None:
    """torch 2.11 guards every field of a frozen dataclass, lists inside it too: a layer then gave up compiling."""
    assert not AttentionCall.__dataclass_params__.frozen  # type: ignore[attr-defined]
