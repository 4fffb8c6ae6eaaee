"""Checks of what the loop makes of the samples of all ranks; `test_loop_on_ranks` runs them on 2 ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from checkpoint_checks import job_over, signed
from stage_helpers import config_for, draw_sample, expect_error, make_trainee, pack, step_batches

from hive_ds.config import TrainingConfig
from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.batch import BadSample, PackedBatch
from hive_ds.training.distributed import all_values, barrier
from hive_ds.training.loop import Job, evaluate, train

SAMPLES = 50
"""Of a batch, as far as the loop counts: only two are computed."""
WAIT = 3.0
"""Seconds; a step takes less."""


@dataclass(frozen=True)
class Flawed:
    """A loader whose batches on the last rank replace so many bad samples, step by step."""

    ranks: Any
    bad: Sequence[int]
    max_bad_share: float = 0.01
    infinite: tuple[int, ...] = ()
    """Steps whose images there are infinite, so that every rank skips them."""

    batch_size = SAMPLES

    def __len__(self) -> int:
        return len(self.bad)

    def __iter__(self) -> Iterator[PackedBatch]:
        last = self.ranks.world.rank == self.ranks.world.size - 1
        for step, count in enumerate(self.bad):
            (batch,) = step_batches(self.ranks, step, 2)
            if last and step in self.infinite:
                batch.images["pixel_values"][:] = float("inf")
            bad = [BadSample(f"b{step}-{number}", "planted") for number in range(count * last)]
            yield replace(batch, sample_ids=[f"s{number}" for number in range(SAMPLES)], bad=tuple(bad))

    @property
    def num_samples(self) -> int:
        return SAMPLES * len(self) * self.ranks.world.size

    def first(self, _count: int) -> Iterator[PackedBatch]:
        return iter(self)

    def state_dict(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class TakenOver(Flawed):
    """Another attempt signs the stage's folder before its third batch, which is fetched in the second step."""

    def __iter__(self) -> Iterator[PackedBatch]:
        for step, batch in enumerate(super().__iter__()):
            if step == 2:
                signed(self.ranks, folder_of(self), "new")
                barrier()
            yield batch


@dataclass(frozen=True)
class Late(Flawed):
    """Every rank waits `WAIT` seconds for its third batch, which is fetched in the second step."""

    def __iter__(self) -> Iterator[PackedBatch]:
        for step, batch in enumerate(super().__iter__()):
            time.sleep(WAIT * (step == 2))
            yield batch


@dataclass(frozen=True)
class HeldOut:
    """A folder of eight samples a rank, in micro-batches of ``batch_size``, dealt to ranks in turn."""

    ranks: Any
    batch_size: int

    @property
    def num_samples(self) -> int:
        return 8 * self.ranks.world.size

    def first(self, count: int) -> Iterator[PackedBatch]:
        size, rank = self.ranks.world.size, self.ranks.world.rank
        samples = [draw_sample(number, 1) for number in range(self.num_samples)]
        for start in range(0, -(-count // size), self.batch_size):
            places = [number * size + rank for number in range(start, start + self.batch_size)]
            batch = pack([samples[place] for place in places])
            kept = torch.tensor([place < count for place in places])
            kept = kept.repeat_interleave(torch.tensor(batch.text_lengths))
            yield replace(batch, labels=batch.labels.where(kept, IGNORE_INDEX))


def folder_of(loader: Flawed) -> Path:
    return loader.ranks.folder / f"{type(loader).__name__}-{sum(loader.bad)}-{len(loader)}"


def job_of(ranks: Any, loader: Flawed, *, log_interval: int = 1, **counts: float) -> Job:
    """A stage over ``loader``, in a folder of its own; ``counts`` are those that its checkpoint brought."""
    trainee, steps = make_trainee(ranks, config=config_for(2)), len(loader)
    folder = folder_of(loader)
    folder.mkdir(exist_ok=True)
    training = TrainingConfig(validation_interval=0, log_interval=log_interval)
    return job_over(ranks, trainee, loader, folder, steps, training, **counts)


def check_bad_share_of_all_ranks(ranks: Any) -> None:
    """Two of one rank's first 50, 0.3 % of all, pass; 5 % of all end the run on every rank, also in a validation.

    What a run met before it was resumed counts. Where none is allowed, the first ends it.
    """
    few = job_of(ranks, Flawed(ranks, [2, 0, 0, 0, 0, 0, 0]))
    assert train(few, 0) == 7
    assert (few.meter.bad_samples, few.meter.samples) == (2, 7 * SAMPLES * ranks.world.size)
    state = json.loads((few.checkpoints.folder / "checkpoints" / "step-000007" / "state.json").read_text())
    assert state["loader"]["counts"] == {"cut_samples": 0, "bad_samples": 2}

    many = job_of(ranks, Flawed(ranks, [10] * 7))
    expect_stop(
        many, "20 bad samples among 200 on all ranks, more than {} and chance allow (19); the last, b1-9: planted"
    )
    losses = Flawed(ranks, [0, 0, 0, 20])
    message = expect_error(lambda: evaluate(few, losses))
    assert message.startswith("20 bad samples among 400 on all ranks, more than data.max_bad_share = 0.01"), message

    resumed = job_of(ranks, Flawed(ranks, [0, 3]), samples=5000, bad_samples=71)
    expect_stop(
        resumed, "74 bad samples among 5200 on all ranks, more than {} and chance allow (73); the last, b1-2: planted"
    )
    strict = job_of(ranks, Flawed(ranks, [1], max_bad_share=0.0))
    expect_stop(
        strict, "1 bad samples among 100 on all ranks, more than {} and chance allow (0); the last, b0-0: planted"
    )
    for job in (few, many, resumed, strict):
        job.engine.close()


def check_validation_loss_of_the_same_samples(ranks: Any) -> None:
    """A validation loss is of the first samples of the folder, whatever micro-batches and ranks compute it."""
    job, size = job_of(ranks, Flawed(ranks, [0])), ranks.world.size

    def loss(samples: int, micro: int) -> float:
        training = replace(job.training, validation_samples=samples)
        return evaluate(replace(job, training=training), HeldOut(ranks, micro))

    with torch.no_grad():
        (of_all,) = step_batches(SimpleNamespace(world=SimpleNamespace(rank=0, size=1)), 0, 8 * size, (1,) * 8 * size)
        whole = float(job.engine.forward(**of_all.model_inputs(ranks.device, job.engine.dtype)).loss)
    for micro in (1, 2, 4, 8):
        torch.testing.assert_close(loss(8 * size, micro), whole, rtol=1e-5, atol=0)
    first, *others = (loss(4 * size, micro) for micro in (1, 2, 4))
    torch.testing.assert_close(others, [first] * 2, rtol=1e-5, atol=0)
    assert abs(first - whole) > 1e-3 * whole
    torch.testing.assert_close(loss(3 * size, 2), loss(3 * size, 1), rtol=1e-5, atol=0)
    assert loss(10**6, 4) == loss(8 * size, 4), "no more than there are"

    modes: list[bool] = []
    with job.engine.model.register_forward_pre_hook(lambda model, _: modes.append(model.training)):
        loss(8 * size, 4)
    assert modes == [False, False], "dropout is off"
    assert job.engine.model.training
    job.engine.close()


def check_replaced_attempt_logs_nothing(ranks: Any) -> None:
    """An attempt that another has replaced ends on every rank after the step, and its lines stay away."""
    job = job_of(ranks, TakenOver(ranks, [0] * 4))
    found = all_values(expect_error(lambda: train(job, 0)))
    folder = folder_of(job.loader)
    assert found == [f"{folder}: attempt new took over from this one, first; nothing was written"] * job.world.size
    if ranks.world.is_main:
        (line,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        assert (line["event"], line["step"]) == ("train", 1)
    job.engine.close()


def check_waits_count_where_they_pass(ranks: Any) -> None:
    """What ranks wait for the next step's data passes in this step: no line says that more was waited than passed."""
    job = job_of(ranks, Late(ranks, [0] * 5))
    train(job, 0)
    if ranks.world.is_main:
        lines = [json.loads(line) for line in (folder_of(job.loader) / "metrics.jsonl").read_text().splitlines()]
        waits = [line["data_wait_share"] * line["seconds_per_step"] for line in lines if line["event"] == "train"]
        assert WAIT <= waits[1] < 2 * WAIT, waits
        assert max(waits[:1] + waits[2:]) < WAIT, waits
        assert all(line["data_wait_share"] < 1 for line in lines if line["event"] == "train"), lines
    job.engine.close()


def check_skipped_steps_are_left_out_of_the_mean_loss(ranks: Any) -> None:
    """Of two steps to a line, of which one was skipped, the other's loss is logged; of two skipped ones, none.

    The last step has a line, whatever the interval.
    """
    losses = {}
    for interval in (1, 2):
        job = job_of(ranks, Flawed(ranks, [0] * 7, infinite=(1, 4, 5)), log_interval=interval)
        train(job, 0)
        job.engine.close()
        if ranks.world.is_main:
            lines = map(json.loads, (job.checkpoints.folder / "metrics.jsonl").read_text().splitlines())
            losses[interval] = [line["loss"] for line in lines if line["event"] == "train"]
    if ranks.world.is_main:
        single, double = losses[1], losses[2]
        assert [loss is None for loss in single] == [False, True, False, False, True, True, False]
        assert (double[0], *double[2:]) == (single[0], None, single[6])
        assert min(single[2:4]) < double[1] < max(single[2:4])


def check_endless_skips(ranks: Any) -> None:
    """Row 15: skipped steps are counted, with every rank's samples, and end a run; one rank's gradient stops all."""
    for precision in ("fp32", "bf16"):
        endless_skips(ranks, precision)


def endless_skips(ranks: Any, precision: str) -> None:
    trainee = make_trainee(ranks, stage=3, precision=precision, config=config_for(2))

    class Batches:
        state_dict = dict

        def __iter__(self) -> Iterator[Any]:
            for step in range(20):
                for batch in step_batches(ranks, step, 2):
                    if (step == 1 or step > 3) and ranks.world.rank == ranks.world.size - 1:
                        batch.images["pixel_values"][:] = float("inf" if step == 1 else "nan")
                    yield batch

    folder = ranks.folder / f"skips-{precision}"
    folder.mkdir(exist_ok=True)
    job = job_over(ranks, trainee, Batches(), folder, 20, TrainingConfig(max_skipped_steps=3))
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


def expect_stop(job: Job, message: str) -> None:
    found = expect_error(lambda: train(job, 0))
    assert all_values(found) == [message.format(f"data.max_bad_share = {job.loader.max_bad_share}")] * job.world.size
    if job.world.is_main:
        lines = (job.checkpoints.folder / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert (last["event"], last["samples"][-1]["reason"]) == ("bad_samples", "planted")
