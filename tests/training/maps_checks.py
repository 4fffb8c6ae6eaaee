"""Checks of gradient norms and maps during training; `test_loop_on_ranks` runs them on 2 ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from stage_helpers import (
    FEW,
    config_for,
    make_cascaded,
    make_model,
    make_trainee,
    run_step,
    state_of,
    step_batches,
)
from tiny_data import make_image_processor, make_samples, make_tokenizer
from tiny_models import IMAGE_SIZE, VOCABULARY

from hive_ds.analysis.block_gradients import block_gradients, watched_gradients
from hive_ds.analysis.gradient_pictures import gradient_maps
from hive_ds.analysis.samples import Subject
from hive_ds.processing import HiveProcessor
from hive_ds.stages import Stage, stage_by_number
from hive_ds.training.ds_config import read_policy
from hive_ds.training.maps import SampleMaps, norms_over_ranks
from hive_ds.training.random_state import random_state

STEPS = 3
MAPPED = (0, 2)
"""Steps with maps: the steps between and after show what the maps leave behind."""
IMAGES = (1, 0, 2, 1)
CASES = (("hive", 3, "parts"), ("hive", 1, "parts"), ("cascaded", 3, "parts"), ("hive", 3, 0))
"""Kind of model, stage (in 1 the encoder is frozen), ZeRO policy: of `parts_policy`, or a number."""


def drawn_model(kind: str, stage: Stage, vocabulary: int) -> Any:
    """With recomputed activations, as large models train."""
    changes = {"text_changes": {"vocab_size": vocabulary}}
    model = make_model(stage, **changes) if kind == "hive" else make_cascaded(**changes)
    model.gradient_checkpointing_enable()
    return model


def parts_policy(ranks: Any) -> str:
    """Path of zero3 where every weight is in parts between its uses: zero3 keeps small ones, here all, whole."""
    policy = read_policy("zero3")
    policy["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": FEW}
    path = ranks.folder / f"parts.{ranks.world.rank}.json"
    path.write_text(json.dumps(policy))
    return str(path)


def sample_maps(ranks: Any) -> SampleMaps:
    sample = next(sample for sample in make_samples(20) if len(sample.images) == 1)
    processor = HiveProcessor(make_image_processor(size=IMAGE_SIZE), make_tokenizer("llama3"))
    return SampleMaps(ranks.folder, sample, processor, "plain")


def equal_states(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return all(equal_states(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return all(equal_states(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@dataclass(frozen=True)
class Trained:
    """What a few steps came to."""

    rows: list[list[float]]
    """Loss and gradient norms of every step."""
    random: dict[str, Any]
    weights: dict[str, torch.Tensor]
    norms: dict[int, float]
    """Of the last maps."""


def trained(ranks: Any, case: tuple[str, int, str | int], vocabulary: int, maps: SampleMaps | None) -> Trained:
    kind, number, zero = case
    stage, policy = stage_by_number(number, kind), parts_policy(ranks) if zero == "parts" else zero
    torch.manual_seed(5)
    model = drawn_model(kind, stage, vocabulary)
    trainee = make_trainee(ranks, stage=stage, zero=policy, model=model, config=config_for(1))
    rows, norms = [], {}
    for step in range(STEPS):
        loss, report = run_step(ranks, trainee, step_batches(ranks, step, 1, IMAGES))
        rows.append([loss, *report.grad_norms.values()])
        if maps is not None and step in MAPPED:
            norms = maps.draw(trainee.engine, step + 1)
            assert whole_weights(trainee.engine.model) == [], case
            assert all(parameter.grad is None for parameter in trainee.engine.model.parameters())
        torch.rand(1)
    result = Trained(rows, random_state(), state_of(trainee), norms)
    trainee.engine.close()
    return result


def check_maps_change_nothing(ranks: Any) -> None:
    """Losses, gradient norms, random states and weights are bit-equal with and without maps, which are the model's."""
    drawn = sample_maps(ranks)
    vocabulary = len(drawn.processor.tokenizer)
    for place, case in enumerate(CASES):
        maps = replace(drawn, folder=ranks.folder / f"maps{place}")
        plain, mapped = (trained(ranks, case, vocabulary, one) for one in (None, maps))
        assert mapped.rows == plain.rows, case
        assert equal_states(mapped.random, plain.random), case
        assert equal_states(mapped.weights, plain.weights), case
        if ranks.world.is_main:
            model = drawn_model(case[0], stage_by_number(case[1], case[0]), vocabulary)
            model.load_state_dict(mapped.weights)
            expect_drawn(maps, model, mapped.norms)


def whole_weights(model: Any) -> list[str]:
    """Weights under ZeRO-3 that are gathered."""
    return [name for name, p in model.named_parameters() if hasattr(p, "ds_id") and p.ds_status.name != "NOT_AVAILABLE"]


def expect_drawn(maps: SampleMaps, model: Any, norms: dict[int, float]) -> None:
    """The last norms are those of one process with the same weights, and all pictures are there."""
    subject = Subject("alone", model.eval(), maps.processor, maps.template)
    alone = gradient_maps(subject, maps.sample)
    assert sorted(norms) == [1, 2, 3]
    torch.testing.assert_close(torch.tensor([*norms.values()]), torch.tensor([*alone.gradients.norms().values()]))
    names = sorted(path.name for path in maps.folder.iterdir())
    assert names == [f"step-{step:06d}-{what}.png" for step in (1, 3) for what in ("attention", "gradients")]


def check_block_grad_norms(ranks: Any) -> None:
    """Norms of the training's own backward are those of one batch in one process; a frozen encoder has none."""
    alone = SimpleNamespace(world=SimpleNamespace(rank=0, size=1))
    for kind, number in (("hive", 3), ("cascaded", 3), ("hive", 1)):
        stage = stage_by_number(number, kind)
        model = drawn_model(kind, stage, VOCABULARY)
        (batch,) = step_batches(alone, 0, 4, IMAGES)
        expected = block_gradients(model.eval(), batch.model_inputs("cpu", torch.float32)).norms()
        trainee = make_trainee(ranks, stage=stage, model=model.train(), config=config_for(1))
        with watched_gradients(trainee.engine.model) as squares:
            run_step(ranks, trainee, step_batches(ranks, 0, 1, IMAGES))
        found = norms_over_ranks(squares, trainee.engine)
        assert sorted(found) == ([1, 2, 3] if number == 3 else [])
        for block, norm in found.items():
            assert abs(norm - expected[block]) <= 1e-5 * expected[block], (kind, block, norm, expected[block])
        trainee.engine.close()


def check_weights_are_let_go(ranks: Any) -> None:
    """A backward pass of its own leaves gathered weights behind, which `Engine.release` partitions again."""
    maps = sample_maps(ranks)
    stage = stage_by_number(3)
    model = drawn_model("hive", stage, len(maps.processor.tokenizer))
    trainee = make_trainee(ranks, stage=stage, zero=parts_policy(ranks), model=model, config=config_for(1))
    run_step(ranks, trainee, step_batches(ranks, 0, 1, IMAGES))
    model = trainee.engine.model.eval()
    gradient_maps(Subject("engine", model, maps.processor, maps.template), maps.sample)
    left = whole_weights(model)
    trainee.engine.release()
    assert left
    assert whole_weights(model) == []
    trainee.engine.close()
