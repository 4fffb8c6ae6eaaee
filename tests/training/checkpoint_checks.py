"""Checks of checkpoints, hand-over and the loop; `test_engine` runs them on 2 ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from stage_helpers import (
    COMBINATIONS,
    config_for,
    expect_error,
    make_model,
    make_trainee,
    moved,
    run_step,
    state_of,
    step_batches,
)

from hive_ds.config import TrainingConfig
from hive_ds.model.loading import load_weights
from hive_ds.stages import stage_by_number
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint import (
    RunIdentity,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
from hive_ds.training.distributed import barrier
from hive_ds.training.flops import FlopCounter
from hive_ds.training.loop import Job, train
from hive_ds.training.metrics import Meter, MetricsLog
from hive_ds.training.schedule import Schedule


class FakeProcessor:
    """Stands in for the processor that is saved beside a model."""

    def save_pretrained(self, folder: Any) -> None:
        (folder / "processor.txt").write_text("processor")


def signed(ranks: Any, folder: Any, name: str = "first") -> Attempt:
    """An attempt that has signed ``folder``."""
    attempt = Attempt(folder, ranks.world, {"HIVE_ATTEMPT": name})
    attempt.sign()
    return attempt


def identity_of(ranks: Any, trainee: Any, config: Any, precision: str = "fp32") -> RunIdentity:
    ds_config = {"zero_optimization": {"stage": trainee.engine.zero_stage}}
    training = TrainingConfig(precision=precision)
    return RunIdentity.of(trainee.plan, training, config, ranks=ranks.world.size, ds_config=ds_config)


def check_hand_over(ranks: Any) -> None:
    """Rows 2 and 23: a stage starts from exactly the previous one's weights, tied head or not; new ones are copied."""
    for tied in (True, False):
        changes = {"text_changes": {"tie_word_embeddings": tied}}
        trainee = make_trainee(ranks, stage=1, model=make_model(stage_by_number(1), **changes), config=config_for(2))
        for step in range(3):
            run_step(ranks, trainee, step_batches(ranks, step, 2))
        saved = state_of(trainee)
        folder = ranks.folder / f"model-{tied}"
        save_model(folder, trainee.engine, FakeProcessor(), ranks.world, signed(ranks, ranks.folder))
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
                attempt = signed(ranks, folder)
                save_checkpoint(folder, step, straight.engine, identity, {"samples": 8}, ranks.world, attempt)
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
        save_checkpoint(folder, step, trainee.engine, identity, {}, ranks.world, signed(ranks, folder))
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


def check_attempts(ranks: Any) -> None:
    """Row 11, fenced: an attempt that another has replaced publishes nothing; both stop by a file or by the time."""
    folder = ranks.folder / "attempts"
    trainee = make_trainee(ranks, config=config_for(2))
    identity = identity_of(ranks, trainee, config_for(2))
    old, new = signed(ranks, folder, "old"), signed(ranks, folder, "new")
    barrier()
    if ranks.world.is_main:
        assert "attempt new took over from this one, old; nothing was written" in expect_error(old.check)
    new.check()
    save_checkpoint(folder, 1, trainee.engine, identity, {}, ranks.world, new)
    assert not new.should_stop(ranks.device)
    late = Attempt(folder, ranks.world, {"HIVE_ATTEMPT": "new", "HIVE_STOP_AT": "1000"})
    assert late.should_stop(ranks.device)
    if ranks.world.is_main:
        (folder / "STOP").touch()
    assert new.should_stop(ranks.device)
    message = expect_error(lambda: Attempt(folder, ranks.world, {"HIVE_STOP_AT": "noon"}))
    assert message == "HIVE_STOP_AT is 'noon'; expected seconds since the epoch"
    trainee.engine.close()


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
        attempt=Attempt(folder, ranks.world, {}),
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
