"""Checks of checkpoints, hand-over and the loop; `test_engine` runs them on 2 ranks."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from stage_helpers import (
    COMBINATIONS,
    config_for,
    expect_error,
    make_model,
    make_trainee,
    moved,
    run_step,
    scrambled,
    state_of,
    step_batches,
)

from hive_ds.config import TrainingConfig
from hive_ds.model.loading import load_weights
from hive_ds.stages import stage_by_number
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint import (
    CheckpointWriter,
    RunIdentity,
    load_checkpoint,
    newest_checkpoint,
    save_model,
)
from hive_ds.training.checkpoint_files import check_space
from hive_ds.training.distributed import barrier
from hive_ds.training.flops import FlopCounter
from hive_ds.training.loop import Job, train
from hive_ds.training.metrics import Meter, MetricsLog
from hive_ds.training.pace import Pace
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


def identity_of(trainee: Any, config: Any, precision: str = "fp32") -> RunIdentity:
    return RunIdentity.of(trainee.plan, TrainingConfig(precision=precision), config)


def writer_of(
    ranks: Any, trainee: Any, folder: Any, config: Any, precision: str = "fp32", **training: Any
) -> CheckpointWriter:
    """A writer of checkpoints whose attempt has signed ``folder``."""
    identity, attempt = identity_of(trainee, config, precision), signed(ranks, folder)
    options = TrainingConfig(precision=precision, **training)
    return CheckpointWriter(folder, trainee.engine, identity, {"recipe.name": "one"}, ranks.world, attempt, options)


def load(ranks: Any, path: Any, trainee: Any, identity: RunIdentity, warnings: list[str] | None = None) -> Any:
    warn = print if warnings is None else warnings.append
    origin = {"recipe.name": "one" if warnings is None else "two"}
    return load_checkpoint(path, trainee.engine, identity, ranks.world, origin=origin, warn=warn)


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

        def build(fresh: bool, zero: int = zero, precision: str = precision, config: Any = config) -> tuple[Any, Any]:
            model = make_model(stage_by_number(3))
            model = model if fresh else scrambled(model, stage_by_number(3))
            trainee = make_trainee(ranks, stage=3, zero=zero, precision=precision, config=config, model=model)
            return trainee, identity_of(trainee, config, precision)

        straight, identity = build(fresh=True)
        expected = []
        for step in range(5):
            if step == 2:
                assert writer_of(ranks, straight, folder, config, precision).save(step, {"samples": 8}) is None
            loss, report = run_step(ranks, straight, step_batches(ranks, step, 1), factor=1 - step / 5)
            expected.append((loss, report.grad_norms))
        wanted = state_of(straight)
        straight.engine.close()
        resumed, identity = build(fresh=False)
        path = newest_checkpoint(folder, ranks.world, print)
        first, position = load(ranks, path, resumed, identity)
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
    identity = identity_of(trainee, config_for(2))
    writer = writer_of(ranks, trainee, folder, config_for(2), keep_every=2)
    for step in range(1, 7):
        assert writer.save(step, {}) is None
    assert (folder / "latest").read_text() == "step-000006"
    steps = [folder / "checkpoints" / f"step-{step:06d}" for step in range(7)]
    if ranks.world.is_main:
        assert sorted((folder / "checkpoints").iterdir()) == [steps[2], steps[4], steps[5], steps[6]]
        with (steps[6] / "rank-00001.pt").open("ab") as file:
            file.write(b"x")
        pieces = steps[5] / "pieces-00000.safetensors"
        data = pieces.read_bytes()
        pieces.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    barrier()
    warnings: list[str] = []
    found = newest_checkpoint(folder, ranks.world, warnings.append)
    assert found == steps[4]
    assert len(warnings) == 2
    assert "step-000006 is not complete and is passed over: rank-00001.pt has" in warnings[0]
    assert "step-000005 is not complete and is passed over: pieces-00000.safetensors has been changed" in warnings[1]
    other = make_trainee(ranks, stage=1, config=config_for(2))
    message = expect_error(lambda: load(ranks, found, other, identity_of(other, config_for(2))))
    assert "written with stage modality_adaptation, this run has connector_pretraining" in message, message
    widened = replace(identity, parameters={**identity.parameters, "more": [2]})
    message = expect_error(lambda: load(ranks, found, trainee, widened))
    assert "it holds another model: 1 trained parameters differ, first more with shape None against [2]" in message
    changed = make_trainee(ranks, config=config_for(2), model=make_model(stage_by_number(2), seed=3))
    message = expect_error(lambda: load(ranks, found, changed, identity))
    assert "frozen weights vision_encoder" in message, message
    assert "are not those it was trained with" in message, message
    said: list[str] = []
    load(ranks, found, trainee, identity, said)
    assert said == [f"checkpoint {found} was written with recipe.name = one, this run has two"]
    for one in (trainee, other, changed):
        one.engine.close()


def check_full_disk(ranks: Any) -> None:
    """A checkpoint that cannot be written on one rank is said on all, and those before stay as they were."""
    folder = ranks.folder / "full"
    trainee = make_trainee(ranks, config=config_for(2))
    writer = writer_of(ranks, trainee, folder, config_for(2))
    assert writer.save(1, {}) is None
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if ranks.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    failed = writer.save(2, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
    assert failed is not None
    assert "File too large" in failed, failed
    barrier()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(OSError, match=r"GB left, and a checkpoint takes 1000000000\.00 GB"):
        check_space(folder, 10**18)
    trainee.engine.close()


def check_attempts(ranks: Any) -> None:
    """Row 11, fenced: an attempt that another has replaced publishes nothing; both stop by a file or by the time."""
    folder = ranks.folder / "attempts"
    trainee = make_trainee(ranks, config=config_for(2))
    old, new = signed(ranks, folder, "old"), signed(ranks, folder, "new")
    barrier()
    if ranks.world.is_main:
        assert "attempt new took over from this one, old; nothing was written" in expect_error(old.check)
    new.check()
    writer = writer_of(ranks, trainee, folder, config_for(2))
    assert replace(writer, attempt=signed(ranks, folder, "new")).save(1, {}) is None
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
    for precision in ("fp32", "bf16"):
        endless_skips(ranks, precision)


def endless_skips(ranks: Any, precision: str) -> None:
    trainee = make_trainee(ranks, stage=3, precision=precision, config=config_for(2))

    def batches() -> Iterator[Any]:
        for step in range(20):
            for batch in step_batches(ranks, step, 2):
                # On one rank alone: gradients are shared, so every rank must skip.
                if (step == 1 or step > 3) and ranks.world.rank == ranks.world.size - 1:
                    batch.images["pixel_values"][:] = float("inf" if step == 1 else "nan")
                yield batch

    folder = ranks.folder / f"skips-{precision}"
    folder.mkdir(exist_ok=True)
    job = Job(
        engine=trainee.engine,
        loader=batches(),
        validation={},
        schedule=Schedule(20, 0.0, 0.0),
        training=TrainingConfig(max_skipped_steps=3),
        metrics=MetricsLog(folder / "metrics.jsonl", ranks.world, 0),
        meter=Meter(ranks.world.size, 1e12, ranks.device),
        pace=Pace(ranks.world, ranks.device, torch.float32),
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
