"""Checks of checkpoints, hand-over and the loop; `test_loop_on_ranks` runs them on 2 ranks."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from hive_ds.model.weights import load_weights
from hive_ds.stages import stage_by_number
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint import RunIdentity, load_checkpoint, newest_checkpoint, read_state, save_model
from hive_ds.training.checkpoint_tools import reshard
from hive_ds.training.checkpoint_writer import CheckpointWriter
from hive_ds.training.distributed import barrier
from hive_ds.training.flops import FlopCounter
from hive_ds.training.loop import Job
from hive_ds.training.metrics import Meter, MetricsLog
from hive_ds.training.pace import Pace
from hive_ds.training.piece_files import PieceCopy
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
    return RunIdentity.of(trainee.plan, TrainingConfig(precision=precision), config, trainee.engine.model)


def writer_of(
    ranks: Any, trainee: Any, folder: Any, config: Any, precision: str = "fp32", **training: Any
) -> CheckpointWriter:
    """A writer of checkpoints whose attempt has signed ``folder``."""
    identity, attempt = identity_of(trainee, config, precision), signed(ranks, folder)
    options = TrainingConfig(precision=precision, **training)
    return CheckpointWriter(folder, trainee.engine, identity, {"recipe.name": "one"}, ranks.world, attempt, options)


def save(writer: CheckpointWriter, step: int, position: dict[str, Any] | None = None) -> str | None:
    """Save and wait for it; why it failed."""
    writer.begin(step, position or {})
    report = writer.wait()
    assert report is not None
    assert report.step == step
    assert 0 < report.blocked_seconds <= report.seconds
    return report.failed


@contextmanager
def held_back(here: bool = True) -> Iterator[threading.Event]:
    """Within, no thread of this rank, if it is ``here``, writes pieces until the event is set."""
    event = threading.Event()
    write = PieceCopy.write

    def wait_and_write(self: PieceCopy, path: Any) -> None:
        assert event.wait(60)
        write(self, path)

    with pytest.MonkeyPatch.context() as patch:
        if here:
            patch.setattr(PieceCopy, "write", wait_and_write)
        yield event


def load(ranks: Any, path: Any, trainee: Any, identity: RunIdentity, warnings: list[str] | None = None) -> Any:
    warn = print if warnings is None else warnings.append
    origin = {"recipe.name": "one" if warnings is None else "two"}
    state = read_state(path, trainee.engine, identity, origin=origin, warn=warn)
    load_checkpoint(path, state, trainee.engine, ranks.world)
    return state["step"], state["loader"]


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
    """Straight training = a checkpoint loaded by fresh objects, to the bit, for every ZeRO stage and precision.

    It holds the step at which it was begun, though a step was trained before its writing was through. Under ZeRO 2 and
    3 it is read after it was cut anew for three ranks.
    """
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
                writer = writer_of(ranks, straight, folder, config, precision)
                with held_back() as threads:
                    writer.begin(step, {"samples": 8})
                    loss, report = run_step(ranks, straight, step_batches(ranks, step, 1), factor=1 - step / 5)
                    assert writer.advance(writing=True) is None
                    threads.set()
                expected.append((loss, report.grad_norms))
                assert writer.wait().failed is None
                continue
            loss, report = run_step(ranks, straight, step_batches(ranks, step, 1), factor=1 - step / 5)
            expected.append((loss, report.grad_norms))
        wanted = state_of(straight)
        straight.engine.close()
        resumed, identity = build(fresh=False)
        path = newest_checkpoint(folder, ranks.world, print)
        if zero in (2, 3):
            path = resharded(ranks, path)
        first, position = load(ranks, path, resumed, identity)
        assert (first, position) == (2, {"samples": 8})
        for step in range(first, 5):
            loss, report = run_step(ranks, resumed, step_batches(ranks, step, 1), factor=1 - step / 5)
            assert (loss, report.grad_norms) == expected[step], (zero, precision, step)
        assert not moved(wanted, state_of(resumed)), (zero, precision)
        resumed.engine.close()


def resharded(ranks: Any, path: Any) -> Any:
    """The checkpoint at ``path`` again, for three ranks."""
    out = path.parent.parent / "resharded" / path.name
    if ranks.world.is_main:
        reshard(path, out, 3)
    barrier()
    return out


def check_what_universal_checkpoints_lose(ranks: Any) -> None:
    """Groups keep their own rates and decay, tensors their own step counts, frozen weights their values.

    A skipped step counts as none, and is remembered; ranks draw the numbers that they would have drawn.

    DeepSpeed's universal checkpoints (0.19.8) give every group the rate and decay of the first, let tensors share one
    counter, which AdamW then counts up once for each, and do not restore what is frozen.
    """
    config = config_for(2, group_lr={"routed_attention": 5e-4, "image_kv": 1e-4})
    straight, folder = make_trainee(ranks, zero=3, config=config), ranks.folder / "universal"
    for step in range(4):
        batches = step_batches(ranks, step, 2)
        if step == 1:
            batches[0].images["pixel_values"][:] = float("inf")
        if step == 2:
            torch.manual_seed(5 + ranks.world.rank)
            assert save(writer_of(ranks, straight, folder, config), step) is None
            drawn = torch.rand(1)
        run_step(ranks, straight, batches, factor=0.5)
    wanted = state_of(straight)
    straight.engine.close()
    stage = stage_by_number(2)
    for zero in (0, 1, 2, 3):
        resumed = make_trainee(ranks, zero=zero, config=config, model=scrambled(make_model(stage), stage))
        load(ranks, newest_checkpoint(folder, ranks.world, print), resumed, identity_of(resumed, config))
        assert torch.equal(torch.rand(1), drawn)
        assert resumed.engine.skipped_steps == 1
        for step in (2, 3):
            run_step(ranks, resumed, step_batches(ranks, step, 2), factor=0.5)
        groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in resumed.engine._adamw.param_groups}
        assert groups["projectors/decay"] == (1e-3, 0.1), groups
        assert groups["projectors/no_decay"] == (1e-3, 0.0), groups
        assert groups["routed_attention/decay"] == (2.5e-4, 0.1), groups
        assert groups["image_kv/decay"] == (5e-5, 0.1), groups
        counters = [state["step"] for state in resumed.engine._adamw.state.values()]
        assert [float(counter) for counter in counters] == [3.0] * len(counters), zero
        assert len({counter.data_ptr() for counter in counters}) == len(counters) > 1, zero
        found = state_of(resumed)
        trained = {name for group in resumed.plan.groups for name in group.parameters}
        for name, value in wanted.items():
            tolerance = 1e-6 if name in trained else 0.0
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
        resumed.engine.close()


def check_incomplete_checkpoints(ranks: Any) -> None:
    """Resume takes the newest complete checkpoint, says which it passed over, and reads none of another model.

    The next one that is saved then stays, though those passed over are of later steps.
    """
    folder = ranks.folder / "incomplete"
    trainee = make_trainee(ranks, config=config_for(2))
    identity = identity_of(trainee, config_for(2))
    writer = writer_of(ranks, trainee, folder, config_for(2), keep_checkpoints=3, keep_every=30)
    for step in range(10, 70, 10):
        assert save(writer, step) is None
    assert (folder / "latest").read_text() == "step-000060"
    steps = {step: folder / "checkpoints" / f"step-{step:06d}" for step in (30, 40, 45, 50, 60)}
    if ranks.world.is_main:
        assert sorted((folder / "checkpoints").iterdir()) == [steps[30], steps[40], steps[50], steps[60]]
        with (steps[60] / "rank-00001.pt").open("ab") as file:
            file.write(b"x")
        pieces = steps[50] / "pieces-00000.safetensors"
        data = pieces.read_bytes()
        pieces.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    barrier()
    warnings: list[str] = []
    found = newest_checkpoint(folder, ranks.world, warnings.append)
    assert found == steps[40]
    damaged, altered = warnings
    assert "step-000060 is not complete and is passed over: rank-00001.pt has" in damaged
    assert "step-000050 is not complete and is passed over: pieces-00000.safetensors has been changed" in altered
    assert save(writer, 45) is None
    assert newest_checkpoint(folder, ranks.world, warnings.append) == steps[45]
    assert (folder / "latest").read_text() == "step-000045"
    other = make_trainee(ranks, stage=1, config=config_for(2))
    message = expect_error(lambda: load(ranks, found, other, identity_of(other, config_for(2))))
    assert "written with stage modality_adaptation, this run has connector_pretraining" in message, message
    widened = replace(identity, parameters={**identity.parameters, "more": [2]})
    message = expect_error(lambda: load(ranks, found, trainee, widened))
    assert "it holds another model: 1 trained parameters differ, first more with shape None against [2]" in message
    turned = make_trainee(ranks, config=config_for(2), model=make_model(stage_by_number(2), rope="1d"))
    message = expect_error(lambda: load(ranks, found, turned, identity_of(turned, config_for(2))))
    assert "model {'qk_norm': 'pre_rope', 'rope': '2d'}, this run has {'qk_norm': 'pre_rope', 'rope': '1d'}" in message
    layer: Any = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vision_feature_layer=-2)))
    for identity_of_another, difference in (
        (identity_of(trainee, config_for(2), "bf16"), "precision fp32, this run has bf16"),
        (identity_of(trainee, config_for(2, global_batch_size=8)), "global_batch_size 4, this run has 8"),
        (identity_of(SimpleNamespace(plan=trainee.plan, engine=layer), config_for(2)), "{'vision_feature_layer': -2}"),
    ):
        assert difference in expect_error(lambda another=identity_of_another: load(ranks, found, trainee, another))
    changed = make_trainee(ranks, config=config_for(2), model=make_model(stage_by_number(2), seed=3))
    message = expect_error(lambda: load(ranks, found, changed, identity))
    assert re.search("frozen weights vision_encoder.* are not those it was trained with", message), message
    said: list[str] = []
    load(ranks, found, trainee, identity, said)
    assert said == [f"checkpoint {found} was written with recipe.name = one, this run has two"]
    for one in (trainee, other, turned, changed):
        one.engine.close()


def job_over(
    ranks: Any, trainee: Any, loader: Any, folder: Path, steps: int, training: TrainingConfig, **counts: float
) -> Job:
    """So many steps over ``loader``; ``counts`` are those that a checkpoint brought."""
    return Job(
        engine=trainee.engine,
        loader=loader,
        validation={},
        schedule=Schedule(steps, 0.0, 0.0),
        training=training,
        metrics=MetricsLog(folder / "metrics.jsonl", ranks.world, 0),
        meter=Meter(ranks.world.size, 1e12, ranks.device, **counts),
        pace=Pace(ranks.world, ranks.device, torch.float32),
        flops=FlopCounter(trainee.engine.model, trainee.plan),
        patch_size=8,
        world=ranks.world,
        device=ranks.device,
        checkpoints=writer_of(ranks, trainee, folder, config_for(2)),
        attempt=signed(ranks, folder),
    )
