"""Checks of the micro-batch finder on ranks; `test_loop_on_ranks` runs them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from stage_helpers import config_for, draw_sample, make_trainee, moved, pack, run_step, state_of

from hive_ds.cost.memory_watch import MemoryWatch
from hive_ds.data.batch import PackedBatch, stretched
from hive_ds.training.distributed import all_values
from hive_ds.training.micro_batch import LIMIT, find_micro_batch
from hive_ds.training.random_state import random_state

SIZES = [1, 2, 4, 8]
LENGTH = 48
WAYS = ((0, "bf16"), (2, "fp32"), (3, "bf16"), ("zero3_offload_param", "bf16"))
"""ZeRO stages or policies, and precisions."""
STEPS = 2


class CountedMemory:
    """What tensors take, counted op by op, on a device of ``total`` bytes."""

    name = "counted"

    def __init__(self, total: float = 1e12) -> None:
        self.total = int(total)

    def used(self) -> int:
        return 0

    def forget_peak(self) -> None:
        self._watch = MemoryWatch([]).__enter__()

    def peak(self) -> int:
        self._watch.__exit__(None, None, None)
        return self._watch.peak


def batch_of(ranks: Any, size: int) -> PackedBatch:
    """The costliest batch; every rank has another sample. What is drawn, as by dropout, leaves no trace."""
    torch.rand(1)
    return stretched(pack([draw_sample(ranks.world.rank)]), LENGTH, size)


def batches_of_step(ranks: Any, step: int, micro: int) -> list[PackedBatch]:
    """This rank's 8 samples of a step, in micro-batches."""
    first = 1000 * step + 8 * ranks.world.rank
    return [pack([draw_sample(first + i) for i in range(at, at + micro)]) for at in range(0, 8, micro)]


def check_trials_leave_no_trace(ranks: Any) -> None:
    """After trials weights and random state are as before, and steps as those of an engine that made none."""
    total = 8 * ranks.world.size
    for zero, precision in WAYS:
        results: dict[bool, Any] = {}
        weights: dict[bool, Any] = {}
        for tried in (False, True):
            start = 1 if tried else 4
            config = config_for(start, global_batch_size=total)
            trainee = make_trainee(ranks, stage=3, zero=zero, precision=precision, config=config)
            if tried:
                before, drawn = state_of(trainee), random_state()
                find_micro_batch(trainee.engine, SIZES[:2], partial(batch_of, ranks), CountedMemory())
                assert not moved(before, state_of(trainee)), (zero, precision)
                assert torch.equal(drawn["torch"], random_state()["torch"])
                trainee.engine.use_micro_batch(4)
            assert trainee.engine.accumulation == 2
            rows = [run_step(ranks, trainee, batches_of_step(ranks, step, 4)) for step in range(STEPS)]
            results[tried] = [*rows, trainee.engine.skipped_steps]
            weights[tried] = state_of(trainee)
            trainee.engine.close()
        assert results[True] == results[False], (zero, precision)
        assert not moved(weights[True], weights[False]), (zero, precision)


def check_size_that_fits(ranks: Any) -> None:
    """Memory grows by the sample; the fullest rank decides for all, and what does not fit is not tried."""
    policy = ranks.folder / f"bucket-{ranks.world.rank}.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 20_000}}))
    config = config_for(1, global_batch_size=8 * ranks.world.size)
    trainee = make_trainee(ranks, stage=3, zero=str(policy), config=config)
    find = partial(find_micro_batch, trainee.engine, SIZES, partial(batch_of, ranks))
    free = find(CountedMemory())
    assert free.refused is None
    assert free.largest(SIZES) == free.trials[-1]
    bytes_by_size = {trial.size: trial.passes * 1e12 for trial in free.trials}
    assert list(bytes_by_size) == SIZES
    slopes = [(bytes_by_size[2 * size] - bytes_by_size[size]) / size for size in SIZES[1:3]]
    assert abs(slopes[0] / slopes[1] - 1) < 0.05, slopes
    last = ranks.world.rank == ranks.world.size - 1  # one small device among large ones
    tight = find(CountedMemory(1.1 * bytes_by_size[4] / LIMIT if last else 1e12))
    assert [trial.size for trial in tight.trials] == [1, 2, 4]
    assert tight.refused is not None
    assert tight.refused[0] == 8
    assert abs(tight.refused[1] / (LIMIT * bytes_by_size[8] / (1.1 * bytes_by_size[4])) - 1) < 0.05
    chosen = tight.largest(SIZES)
    assert chosen is not None
    assert all_values(chosen.size) == [4] * ranks.world.size
    assert find(CountedMemory(bytes_by_size[1] / 2)).largest(SIZES) is None
    trainee.engine.close()
