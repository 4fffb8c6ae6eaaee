"""Checks of the engine, the loop's step, checkpoints and hand-over; `test_engine` runs them on 1 and 2 ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from stage_helpers import (
    config_for,
    draw_sample,
    make_model,
    make_trainee,
    run_step,
    step_batches,
)
from tiny_models import tiny_hive

from hive_ds.config import TrainingConfig
from hive_ds.errors import HiveError
from hive_ds.model.loading import load_weights
from hive_ds.stages import Stage, stage_by_number
from hive_ds.training.checkpoint import (
    RunIdentity,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
from hive_ds.training.distributed import barrier, from_main
from hive_ds.training.flops import FlopCounter
from hive_ds.training.loop import Job, train
from hive_ds.training.metrics import Meter, MetricsLog
from hive_ds.training.schedule import Schedule

STEPS = 20
BF16_STEPS = 6
COMBINATIONS = ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16"))
"""ZeRO stages and precisions, every code path of DeepSpeed once."""

IMAGES = (1, 0, 2, 1)
"""Images of the four samples of a step: one sample is text alone, one has two."""


class FakeProcessor:
    """Stands in for the processor that is saved beside a model."""

    def save_pretrained(self, folder: Any) -> None:
        (folder / "processor.txt").write_text("processor")


def state_of(trainee: Any) -> dict[str, torch.Tensor]:
    """All weights, on every rank."""
    return from_main(trainee.engine.gather_state())


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def expect_error(call: Any) -> str:
    try:
        call()
    except HiveError as error:
        return str(error)
    raise AssertionError("no HiveError")


def identity_of(ranks: Any, trainee: Any, config: Any, precision: str = "fp32") -> RunIdentity:
    ds_config = {"zero_optimization": {"stage": trainee.engine.zero_stage}}
    training = TrainingConfig(precision=precision)
    return RunIdentity.of(trainee.plan, training, config, ranks=ranks.world.size, ds_config=ds_config)


def trained_losses(ranks: Any, micro: int, zero: int, precision: str = "fp32", steps: int = STEPS) -> list[list[float]]:
    trainee = make_trainee(ranks, stage=3, zero=zero, precision=precision, config=config_for(micro))
    rows = []
    for step in range(steps):
        loss, report = run_step(ranks, trainee, step_batches(ranks, step, micro, IMAGES))
        rows.append([loss, *report.grad_norms.values()])
    trainee.engine.close()
    return rows


def check_losses(ranks: Any) -> dict[str, list[list[float]]]:
    """Loss and gradient norms of 20 steps, for every split of the batch; on 2 ranks for every ZeRO stage."""
    splits, zeros = ([4, 1], (0, 3)) if ranks.world.size == 1 else ([2, 1], (0, 1, 2, 3))
    return {
        f"{ranks.world.size}x{micro} zero{zero}": trained_losses(ranks, micro, zero)
        for micro in splits
        for zero in zeros
    }


def check_bf16(ranks: Any) -> dict[str, list[list[float]]]:
    """The same in bf16."""
    return {f"zero{zero}": trained_losses(ranks, 2, zero, "bf16", BF16_STEPS) for zero in (0, 1, 2, 3)}


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
    stage = Stage(9, "wrong", "own", ("projectors", "vision_tail"))
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


def check_hand_over(ranks: Any) -> None:
    """Rows 2 and 23: a stage starts from exactly the previous one's weights, tied head or not; new ones are copied."""
    for tied in (True, False):
        changes = {"text_changes": {"tie_word_embeddings": tied}}
        trainee = make_trainee(ranks, stage=1, model=make_model(stage_by_number(1), **changes), config=config_for(2))
        for step in range(3):
            run_step(ranks, trainee, step_batches(ranks, step, 2))
        saved = state_of(trainee)
        folder = ranks.folder / f"model-{tied}"
        save_model(folder, trainee.engine, FakeProcessor(), ranks.world)
        trainee.engine.close()
        model = make_model(stage_by_number(2), seed=5, **changes)
        report = load_weights(model, folder)
        assert len(report.copied) == 4, report
        following = make_trainee(ranks, stage=2, model=model, config=config_for(2))
        start = state_of(following)
        assert not moved(saved, {name: start[name] for name in saved})
        layer = "language_model.model.layers.1.self_attn"
        assert torch.equal(start[f"{layer}.image_k_proj.weight"], saved[f"{layer}.k_proj.weight"])
        reloaded = type(model).from_pretrained(folder)
        assert reloaded.language_model.lm_head.weight.shape == saved["language_model.lm_head.weight"].shape
        assert torch.equal(reloaded.language_model.lm_head.weight, saved["language_model.lm_head.weight"])
        following.engine.close()


def check_resume(ranks: Any) -> None:
    """Straight training = a checkpoint loaded by fresh objects, to the bit, for every ZeRO stage and precision."""
    for zero, precision in COMBINATIONS:
        folder = ranks.folder / f"resume-{zero}-{precision}"
        config = config_for(1)

        def build(seed: int, zero: int = zero, precision: str = precision, config: Any = config) -> tuple[Any, Any]:
            model = make_model(stage_by_number(3), seed=seed)
            trainee = make_trainee(ranks, stage=3, zero=zero, precision=precision, config=config, model=model)
            return trainee, identity_of(ranks, trainee, config, precision)

        straight, identity = build(seed=0)
        expected = []
        for step in range(5):
            if step == 2:
                save_checkpoint(folder, step, straight.engine, identity, {"samples": 8}, ranks.world)
            loss, report = run_step(ranks, straight, step_batches(ranks, step, 1), factor=1 - step / 5)
            expected.append((loss, report.grad_norms))
        wanted = state_of(straight)
        straight.engine.close()
        resumed, identity = build(seed=7)
        path = newest_checkpoint(folder, ranks.world, print)
        first, position = load_checkpoint(path, resumed.engine, identity, ranks.world)
        assert (first, position) == (2, {"samples": 8})
        for step in range(first, 5):
            loss, report = run_step(ranks, resumed, step_batches(ranks, step, 1), factor=1 - step / 5)
            assert (loss, report.grad_norms) == expected[step], (zero, precision, step)
        assert not moved(wanted, state_of(resumed)), (zero, precision)
        resumed.engine.close()


def check_incomplete_checkpoints(ranks: Any) -> None:
    """Resume takes the newest complete checkpoint, says which it passed over, and reads none of another model."""
    folder = ranks.folder / "incomplete"
    trainee = make_trainee(ranks, config=config_for(2))
    identity = identity_of(ranks, trainee, config_for(2))
    for step in (1, 2, 3):
        save_checkpoint(folder, step, trainee.engine, identity, {}, ranks.world)
    assert (folder / "latest").read_text() == "step-000003"
    if ranks.world.is_main:
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
        with (folder / "checkpoints" / "step-000003" / "rank-00001.pt").open("ab") as file:
            file.write(b"x")
    barrier()
    warnings: list[str] = []
    found = newest_checkpoint(folder, ranks.world, warnings.append)
    assert found == folder / "checkpoints" / "step-000002"
    if ranks.world.is_main:
        assert len(warnings) == 1
        assert "step-000003 is not complete and is passed over: rank-00001.pt has" in warnings[0]
    other = make_trainee(ranks, stage=1, config=config_for(2))
    wrong = identity_of(ranks, other, config_for(2))
    message = expect_error(lambda: load_checkpoint(found, other.engine, wrong, ranks.world))
    assert "written with stage modality_adaptation, this run has connector_pretraining" in message, message
    widened = replace(identity, parameters={**identity.parameters, "more": [2]})
    message = expect_error(lambda: load_checkpoint(found, trainee.engine, widened, ranks.world))
    assert "it holds another model: 1 trained parameters differ, first more with shape None against [2]" in message
    trainee.engine.close()
    other.engine.close()


def check_endless_skips(ranks: Any) -> None:
    """Row 15: the loop counts skipped steps, logs the samples of every rank, and ends after so many in a row."""
    trainee = make_trainee(ranks, stage=3, config=config_for(2))

    def batches() -> Iterator[Any]:
        for step in range(20):
            for batch in step_batches(ranks, step, 2):
                if step == 1 or step > 3:
                    batch.images["pixel_values"][:] = float("nan")
                yield batch

    folder = ranks.folder / "skips"
    folder.mkdir(exist_ok=True)
    job = Job(
        engine=trainee.engine,
        loader=batches(),
        validation={},
        schedule=Schedule(20, 0.0, 0.0),
        training=TrainingConfig(max_skipped_steps=3),
        metrics=MetricsLog(folder / "metrics.jsonl", ranks.world, 0),
        meter=Meter(ranks.world.size, 1e12, ranks.device),
        flops=FlopCounter(trainee.engine.model, trainee.plan),
        patch_size=8,
        world=ranks.world,
        device=ranks.device,
        save=lambda step: None,
    )
    message = expect_error(lambda: train(job, 0))
    assert message.startswith("step 7: the gradient was not finite for 3 steps in a row"), message
    assert "[['s0', 's1'], ['s2', 's3']]" in message
    if ranks.world.is_main:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        skips = [line for line in lines if line["event"] == "skipped_step"]
        assert [line["step"] for line in skips] == [2, 5, 6, 7]
        assert skips[0]["sample_ids"] == [["s0", "s1"], ["s2", "s3"]]
        assert [line["skipped_steps"] for line in lines if line["event"] == "train"] == [0, 1, 1, 1, 2, 3]
    trainee.engine.close()


def check_generation(ranks: Any) -> list[list[int]]:
    """Row 26: under ZeRO-3 ranks with texts that end at different lengths generate what one process does."""
    trainee = make_trainee(ranks, stage=2, zero=3)
    model = trainee.engine.model.eval()
    results = []
    for seed in (11, 12):
        ids, _, offsets, pixels = draw_sample(seed)
        inputs = {"image_offsets": [offsets], "pixel_values": pixels, "attention_mask": torch.ones_like(ids[None])}
        length = 3 + 4 * ((seed + ranks.world.rank) % 2)  # other lengths on other ranks
        tokens = model.generate(
            ids[None],
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
