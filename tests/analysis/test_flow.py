"""Flow over models: norms of one batch, what routes are worth, drift from the initial encoder."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scene_models import save_cascaded_scene_model, save_scene_model
from torch import Tensor

from hive_ds.analysis import flow as flow_module
from hive_ds.analysis.block_gradients import block_gradients
from hive_ds.analysis.flow import gradient_flow, losses_without_routes, similarity_by_block
from hive_ds.analysis.linear_cka import LinearCka
from hive_ds.analysis.samples import Subject
from hive_ds.data.scenes_samples import question_samples
from hive_ds.errors import HiveError
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.vision import encode_images, vision_blocks

SAMPLES = list(question_samples(0, "questions", 5, 64))
CLOSE = {"rel": 1e-5}


def rerouted(model: HiveForCausalLM, blocks: tuple[int, ...], layers: tuple[int, ...], **changes: Any) -> Any:
    """A model with other routes and, wherever it has them, the same weights."""
    config = copy.deepcopy(model.config)
    config.update({"vision_blocks": blocks, "language_layers": layers, **changes})
    other = HiveForCausalLM(config).eval()
    mine = model.state_dict()
    other.load_state_dict({name: mine.get(name, value) for name, value in other.state_dict().items()})
    return other


@pytest.fixture(scope="module")
def hive(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Blocks 3 and 1 to layer 1, 2 to layer 3; without q/k norms."""
    model, processor = save_scene_model(tmp_path_factory.mktemp("hive"))
    torch.manual_seed(0)
    return Subject("hive", rerouted(model, (3, 1, 2), (1, 1, 3), qk_norm="none"), processor, "chat")


@pytest.fixture(scope="module")
def cascaded(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject("sa", *save_cascaded_scene_model(tmp_path_factory.mktemp("sa")), "chat")


def test_norms_are_those_of_one_batch(hive: Subject, cascaded: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples go together; of HIVE, the last-block baseline and the cascaded model."""
    last = Subject("last", rerouted(hive.model, (4, 4), (1, 3)), hive.processor, "chat")
    monkeypatch.setattr(flow_module, "TOGETHER", 2)
    for subject, reached in ((hive, 3), (last, 4), (cascaded, 3)):
        batch = subject.batch(SAMPLES)
        whole = block_gradients(subject.model, batch.model_inputs("cpu", torch.float32))
        flow = gradient_flow(subject, SAMPLES)
        assert flow.loss == pytest.approx(whole.loss, **CLOSE)
        assert list(flow.norms) == list(range(1, reached + 1))
        assert flow.norms == pytest.approx(whole.norms(), **CLOSE)
        assert flow.supervised_tokens == batch.supervised_tokens
        assert [row["norm"] is None for row in flow.values()["blocks"]] == [block > reached for block in (1, 2, 3, 4)]
    assert flow.read_by == {1: "", 2: "", 3: "LLM input", 4: ""}
    assert (flow.kind, flow.knocked_out) == ("cascaded", {})


def test_a_route_knocked_out_is_a_model_without_it(hive: Subject) -> None:
    """Every route, one of several to a layer among them; all of them: the text by itself."""
    batches = [hive.batch(SAMPLES[:3]), hive.batch(SAMPLES[3:])]
    losses, _ = losses_without_routes(hive, batches)
    pairs = hive.model.routes.pairs
    assert list(losses) == [(3, 1), (1, 1), (2, 3)] == list(pairs)
    whole = hive.batch(SAMPLES).model_inputs("cpu", torch.float32)
    intact = hive.model(**whole).loss.item()
    for pair, loss in losses.items():
        blocks, layers = zip(*(one for one in pairs if one != pair), strict=True)
        assert loss == pytest.approx(rerouted(hive.model, blocks, layers)(**whole).loss.item(), **CLOSE)
        assert abs(loss - intact) > 1e-3
    assert hive.model.routes.pairs == pairs
    # In front of the text an image moves the positions of all its tokens alike.
    in_front = replace(hive.batch(SAMPLES), image_offsets=[[0]] * len(SAMPLES))
    text = {name: whole[name] for name in ("input_ids", "labels", "text_lengths")}
    _, alone = losses_without_routes(hive, [in_front])
    assert alone == pytest.approx(hive.model(**text).loss.item(), **CLOSE)


def features(seed: int, width: int) -> Tensor:
    return torch.randn(200, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka(x: Tensor, y: Tensor, parts: int = 1) -> float:
    whole = LinearCka()
    for one, other in zip(x.chunk(parts), y.chunk(parts), strict=True):
        whole.add(one, other)
    return whole.value()


def test_cka() -> None:
    """Against HSIC over Gram matrices of examples; batches; what changes nothing and what does."""
    x = features(0, 12)
    y = x[:, :7] @ torch.randn(7, 9, dtype=torch.float64) + features(1, 9) + 5
    centre = torch.eye(200, dtype=torch.float64) - 1 / 200
    gram_x, gram_y = (centre @ one @ one.T @ centre for one in (x, y))
    expected = float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))
    assert cka(x, y) == pytest.approx(expected, rel=1e-9)
    assert 0.05 < expected < 0.95
    assert cka(x, y, parts=7) == pytest.approx(expected, rel=1e-9)
    assert cka(y, x) == pytest.approx(expected, rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    assert cka(3 * x @ rotation - 40, y) == pytest.approx(expected, rel=1e-9)
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    assert cka(x * torch.arange(1, 13), y) != pytest.approx(expected, rel=1e-3)
    # One channel each: the squared correlation.
    one, other = x[:, :1], x[:, :1] + 2 * features(2, 1)
    correlation = float(torch.corrcoef(torch.cat([one, other], dim=1).T)[0, 1])
    assert cka(one, other) == pytest.approx(correlation**2, rel=1e-9)


def test_drift_begins_at_the_block_that_moved(hive: Subject) -> None:
    initial = copy.deepcopy(hive.model.vision_encoder)
    with torch.no_grad():
        for parameter in vision_blocks(initial)[1].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    batches = [hive.batch(SAMPLES[:2]), hive.batch(SAMPLES[2:])]
    similarity = similarity_by_block(hive, initial, batches)
    assert similarity[1] == pytest.approx(1, abs=1e-9)
    assert all(0 < similarity[block] < 0.999 for block in (2, 3, 4))
    pixels = hive.batch(SAMPLES).model_inputs("cpu", torch.float32)["pixel_values"]
    ours, theirs = (encode_images(one, [3], pixels).by_block[3] for one in (hive.model.vision_encoder, initial))
    assert similarity[3] == pytest.approx(cka(ours.detach(), theirs.detach()), rel=1e-9)
    other = type(initial)(type(initial.config)(**{**initial.config.to_dict(), "num_hidden_layers": 3}))
    with pytest.raises(HiveError, match="initial encoder with num_hidden_layers 3: expected 4, as the encoder of hive"):
        similarity_by_block(hive, other, batches)
    flow = gradient_flow(hive, SAMPLES[:1], knock_out=True, initial=initial)
    values = flow.values()
    assert [row["similarity"] for row in values["blocks"]] == list(flow.similarity.values())
    assert [row["change"] for row in values["routes"]] == [loss - flow.loss for loss in flow.knocked_out.values()]
    assert len(flow.lines()) == 2 + 4 + 3 + 1


def test_samples_longer_than_the_model_reads(hive: Subject, cascaded: Subject, tmp_path: Path) -> None:
    assert (hive.longest_text, cascaded.longest_text) == (512, 512 - 16)
