"""Checks of the cascaded model under the engine, in every stage of its two tables; `test_engine` compares."""

from __future__ import annotations

from typing import Any

import torch
from stage_helpers import (
    config_for,
    draw_sample,
    in_plain_pytorch,
    make_cascaded,
    make_trainee,
    moved,
    run_step,
    state_of,
    step_batches,
)

from hive_ds.stages import Stage, stage_by_number

STAGES = (1, 2, 3, 4, 5)
CASES = [*(f"stage{number}" for number in STAGES), "stage3 checkpointing", "stage5 zero0"]
STEPS = 4
IMAGES = (1, 0, 2, 1)
"""Of the four samples of a step: with micro-batches of one, a rank has one of text alone."""


def cascaded_stage(number: int) -> Stage:
    """A stage of the SA baseline, or 4 or 5."""
    return stage_by_number(number, "cascaded")


def cascaded_losses(ranks: Any, number: int, micro: int, **options: Any) -> list[list[float]]:
    """Loss and gradient norms of some steps."""
    model = make_cascaded()
    if options.pop("checkpointing", False):
        model.gradient_checkpointing_enable()
    trainee = make_trainee(ranks, stage=cascaded_stage(number), model=model, config=config_for(micro), **options)
    rows = []
    for step in range(STEPS):
        loss, report = run_step(ranks, trainee, step_batches(ranks, step, micro, IMAGES))
        rows.append([loss, *report.grad_norms.values()])
    trainee.engine.close()
    return rows


def check_cascaded_losses(ranks: Any) -> dict[str, list[list[float]]]:
    """Every stage under ZeRO-3, micro-batches of one; stage 3 also with recomputed activations, 5 under ZeRO-0."""
    losses = {f"stage{number}": cascaded_losses(ranks, number, 1) for number in STAGES}
    losses["stage3 checkpointing"] = cascaded_losses(ranks, 3, 1, checkpointing=True)
    losses["stage5 zero0"] = cascaded_losses(ranks, 5, 4 // ranks.world.size, zero=0)
    return losses


def check_cascaded_bf16(ranks: Any) -> None:
    """Stage 5 in bf16 follows fp32; the LLM's rotary frequencies, which DeepSpeed would cast too, stay exact."""
    reference = in_plain_pytorch(make_cascaded(), cascaded_stage(5), STEPS, IMAGES)
    found = cascaded_losses(ranks, 5, 2, precision="bf16")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(reference), rtol=2e-2, atol=2e-3)
    trainee = make_trainee(
        ranks, stage=cascaded_stage(5), model=make_cascaded(), config=config_for(2), precision="bf16"
    )
    rotary = trainee.engine.model.language_model.model.rotary_emb.inv_freq
    assert torch.equal(rotary, make_cascaded().language_model.model.rotary_emb.inv_freq)
    assert trainee.engine.dtype == torch.bfloat16
    trainee.engine.close()


def check_cascaded_batches_without_images(ranks: Any) -> None:
    """Row 1: ranks of text alone, and no image anywhere, with the encoder trained, and frozen."""
    for number in (3, 4):
        trainee = make_trainee(ranks, stage=cascaded_stage(number), model=make_cascaded(), config=config_for(2))
        before = state_of(trainee)
        for step, images in enumerate([(1, 1, 0, 0), (0, 0, 0, 0), (0, 0, 1, 2)]):
            loss, report = run_step(ranks, trainee, step_batches(ranks, step, 2, images))
            assert loss == loss
            assert not report.skipped, step
        trained = {name for group in trainee.plan.groups for name in group.parameters}
        assert moved(before, state_of(trainee)) == trained
        trainee.engine.close()


def check_cascaded_generation(ranks: Any) -> list[list[int]]:
    """Row 26: under ZeRO-3, ranks that end at different lengths generate what one process does."""
    trainee = make_trainee(ranks, stage=cascaded_stage(5), model=make_cascaded())
    model = trainee.engine.model.eval()
    results = []
    for seed in (11, 12):
        ids, _, offsets, pixels = draw_sample(seed)
        tokens = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids[None]),
            image_offsets=[offsets],
            pixel_values=pixels,
            max_new_tokens=3 + 4 * ((seed + ranks.world.rank) % 2),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            synced_gpus=True,
        )
        results.append(tokens[0, len(ids) :].tolist()[:3])
    trainee.engine.close()
    return results
