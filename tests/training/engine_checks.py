"""Checks of the engine and the loop's step; `test_engine` runs them on 1 and 2 ranks."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from compile_checks import expect_same
from stage_helpers import (
    COMBINATIONS,
    config_for,
    draw_sample,
    expect_error,
    make_trainee,
    moved,
    run_step,
    state_of,
    step_batches,
)
from tiny_models import tiny_hive

from hive_ds.stages import Stage, stage_by_number

STEPS = 10
BF16_STEPS = 6
IMAGES = (1, 0, 2, 1)
"""Images of the four samples of a step: one sample is text alone, one has two."""


def trained_losses(
    ranks: Any, micro: int, zero: int | str, precision: str = "fp32", steps: int = STEPS
) -> list[list[float]]:
    trainee = make_trainee(ranks, stage=3, zero=zero, precision=precision, config=config_for(micro))
    rows = []
    for step in range(steps):
        loss, report = run_step(ranks, trainee, step_batches(ranks, step, micro, IMAGES))
        rows.append([loss, *report.grad_norms.values()])
    trainee.engine.close()
    return rows


def check_losses(ranks: Any) -> dict[str, list[list[float]]]:
    """Loss and gradient norms of some steps, for every split of the batch; on 2 ranks for every ZeRO stage.

    ZeRO-3 gathers the model by layers and, on 2 ranks, in one piece too.
    """
    splits, zeros = ([4, 1], (0, 3)) if ranks.world.size == 1 else ([2, 1], (0, 1, 2, 3))
    found = {
        f"{ranks.world.size}x{micro} zero{zero}": trained_losses(ranks, micro, zero)
        for micro in splits
        for zero in zeros
    }
    if ranks.world.size == 1:
        return found
    return found | {f"2x{micro} zero3 whole": trained_losses(ranks, micro, "zero3") for micro in splits}


def check_ranks_on_cpus_see_no_gpu(ranks: Any) -> None:
    """AdamW asks in every step whether there is one, and may have a driver to ask."""
    assert ranks.device.type == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def check_imports_are_left_out_of_collections(ranks: Any) -> None:
    """Torch, transformers and DeepSpeed make half a million objects; DeepSpeed collects several times."""
    assert ranks.frozen > 10**5


def check_deprecated_calls_of_others_are_not_shown(ranks: Any) -> None:
    """DeepSpeed's, whose warnings would cut into the progress bar."""
    with warnings.catch_warnings(record=True) as shown:
        own = torch.zeros(1, device=ranks.device)
        dist.all_gather_into_tensor(own.new_empty(ranks.world.size), own)
    assert not shown, [str(one.message) for one in shown]


def check_bf16(ranks: Any) -> dict[str, list[list[float]]]:
    """The same in bf16."""
    policies = {**{f"zero{zero}": zero for zero in (0, 1, 2, 3)}, "zero3 whole": "zero3"}
    return {name: trained_losses(ranks, 2, policy, "bf16", BF16_STEPS) for name, policy in policies.items()}


def check_compiled_layers_under_zero3(ranks: Any) -> None:
    """Layer by layer, as a large model is gathered. By Inductor, and the other stages: `compile_checks` (long)."""
    expect_same(ranks, (3,), "fp32", backend="aot_eager", rtol=1e-5, atol=1e-5)


def check_batches_without_images(ranks: Any) -> None:
    """Row 1: a rank without images, samples with several, and no image anywhere, with and without a frozen encoder."""
    for stage in (1, 3):
        trainee = make_trainee(ranks, stage=stage, config=config_for(2))
        before = state_of(trainee)
        for step, images in enumerate([(1, 1, 0, 0), (3, 2, 0, 1), (0, 0, 0, 0), (0, 0, 1, 2)]):
            loss, report = run_step(ranks, trainee, step_batches(ranks, step, 2, images))
            assert loss == loss
            assert not report.skipped, step
        trained = {name for group in trainee.plan.groups for name in group.parameters}
        assert moved(before, state_of(trainee)) == trained
        trainee.engine.close()


def check_empty_group(ranks: Any) -> None:
    """Row 3: a stage whose q/k norms do not exist, and a group with a learning rate of 0, still set every rate."""
    stage = stage_by_number(2)
    model = tiny_hive(image_kv="own", qk_norm="none").train()
    config = config_for(2, group_lr={"routed_attention": 0.0, "image_kv": 5e-4})
    trainee = make_trainee(ranks, stage=stage, model=model, config=config)
    before = state_of(trainee)
    run_step(ranks, trainee, step_batches(ranks, 0, 2), factor=0.5)
    rates = trainee.engine.learning_rates()
    assert rates == {"projectors/decay": 1e-3, "projectors/no_decay": 1e-3, "image_kv/decay": 2.5e-4}, rates
    changed = moved(before, state_of(trainee))
    assert changed
    assert all(name.startswith("projectors.") or "image_" in name for name in changed), changed
    trainee.engine.close()


def check_no_gradient(ranks: Any) -> None:
    """Row 13: parameters that train but get no gradient are named at step 1."""
    stage = Stage(9, "wrong", ("projectors", "vision_tail"))
    trainee = make_trainee(ranks, stage=stage, config=config_for(2))
    message = expect_error(lambda: run_step(ranks, trainee, step_batches(ranks, 0, 2)))
    assert "post_layernorm.weight" in message, message
    assert "projectors" not in message, message
    trainee.engine.close()


def check_flips(ranks: Any) -> None:
    """Row 14: what trains cannot change after the start."""
    trainee = make_trainee(ranks, stage=1, config=config_for(2))
    run_step(ranks, trainee, step_batches(ranks, 0, 2))
    name, parameter = next(iter(trainee.engine.model.language_model.named_parameters()))
    parameter.requires_grad_(True)
    message = expect_error(lambda: run_step(ranks, trainee, step_batches(ranks, 1, 2)))
    assert f"language_model.{name}" in message, message
    trainee.engine.close()


def check_skipped_steps(ranks: Any) -> None:
    """Row 15: an infinite image on the last rank skips the step on all, whatever the ZeRO stage and precision."""
    for zero, precision in COMBINATIONS:
        trainee = make_trainee(ranks, stage=3, zero=zero, precision=precision, config=config_for(2))
        run_step(ranks, trainee, step_batches(ranks, 0, 2))
        before = state_of(trainee)
        batches = step_batches(ranks, 1, 2)
        if ranks.world.rank == ranks.world.size - 1:
            batches[-1].images["pixel_values"][:] = float("inf")
        _, report = run_step(ranks, trainee, batches)
        assert report.skipped, (zero, precision)
        assert trainee.engine.skipped_steps == 1
        assert not moved(before, state_of(trainee)), (zero, precision)
        _, report = run_step(ranks, trainee, step_batches(ranks, 2, 2))
        assert not report.skipped, (zero, precision)
        assert moved(before, state_of(trainee)), (zero, precision)
        trainee.engine.close()


def check_generation(ranks: Any) -> list[list[int]]:
    """Row 26: under ZeRO-3 ranks with texts that end at different lengths generate what one process does."""
    trainee = make_trainee(ranks, stage=2, zero=3)
    model = trainee.engine.model.eval()
    results = []
    for seed in (11, 12):
        ids, _, offsets, pixels = draw_sample(seed)
        ids = ids.to(ranks.device)
        inputs = {"pixel_values": pixels.to(ranks.device), "attention_mask": torch.ones_like(ids[None])}
        length = 3 + 4 * ((seed + ranks.world.rank) % 2)  # other lengths on other ranks
        tokens = model.generate(
            ids[None],
            image_offsets=[offsets],
            **inputs,
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            synced_gpus=True,
        )
        results.append(tokens[0, len(ids) :].tolist()[:3])
    trainee.engine.close()
    return results


def check_tensorboard(ranks: Any) -> None:
    """Row 25: numbers reach TensorBoard's event file through DeepSpeed's monitor."""
    folder = ranks.folder / "tensorboard"
    trainee = make_trainee(ranks, folder=folder, tensorboard=True, config=config_for(2))
    if ranks.world.is_main:
        trainee.engine.write_events({"train/loss": 1.25}, 3)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next(folder.rglob("events.*")).parent)).Reload().Scalars("train/loss")
        assert [(event.step, event.value) for event in events] == [(3, 1.25)]
    trainee.engine.close()
