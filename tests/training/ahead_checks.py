"""Which part of ZeRO-3's gathers is asked for ahead of need, and how much of their time that hides.

`test_gathers_ahead` runs these checks on 2 ranks.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from communication_cases import LARGE_MODEL
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from stage_helpers import Trainee, config_for, make_model, make_trainee, run_step, step_batches

from hive_ds.data.batch import stretched
from hive_ds.stages import stage_by_number
from hive_ds.training.ds_config import read_policy

BUCKETS = (0, 5000, 20_000)
"""Elements that DeepSpeed may fetch ahead; an LLM layer of the model has 33,888 or 40,096, an encoder block 7,504."""
STEPS = 4
"""The last one is counted: in the first two DeepSpeed learns the order."""
_GATHER = "_PartitionedParameterCoordinator__all_gather_params"
_FETCH = "_fetch_sub_module_impl"


class Watch:
    """Counts elements by ``ahead``, ``on demand`` while it is entered."""

    def __init__(self) -> None:
        self.elements: Counter[str] = Counter()
        self._needed: set[int] = set()
        gather, fetch = (
            getattr(PartitionedParameterCoordinator, _GATHER),
            getattr(PartitionedParameterCoordinator, _FETCH),
        )

        def watched_fetch(coordinator: Any, module: Any, forward: bool, is_leaf: bool) -> None:
            self._needed = {parameter.ds_id for parameter in iter_params(module, recurse=is_leaf)}
            fetch(coordinator, module, forward, is_leaf)

        def watched_gather(coordinator: Any, parameters: set[Any], forward: bool) -> None:
            needed = {parameter.ds_id for parameter in parameters} <= self._needed
            absent = [one.ds_numel for one in parameters if one.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            self.elements["on demand" if needed else "ahead"] += sum(absent)
            gather(coordinator, parameters, forward)

        self.patches = patch.multiple(
            PartitionedParameterCoordinator, **{_FETCH: watched_fetch, _GATHER: watched_gather}
        )


def check_ahead(ranks: Any) -> dict[str, dict[str, int]]:
    """Elements gathered in a step of stage 3, by bucket, with recomputation and without."""
    return {
        f"{'recomputed' if recompute else 'stored'} {bucket}": gathered(ranks, bucket, recompute)
        for recompute in (True, False)
        for bucket in BUCKETS
    }


def gathered(ranks: Any, bucket: int, recompute: bool) -> dict[str, int]:
    trainee = make_large(ranks, bucket, recompute)
    for step in range(STEPS - 1):
        run_step(ranks, trainee, step_batches(ranks, step, 2))
    watch = Watch()
    with watch.patches:
        run_step(ranks, trainee, step_batches(ranks, STEPS, 2))
    trainee.engine.close()
    return {"ahead": watch.elements["ahead"], "on demand": watch.elements["on demand"]}


def make_large(ranks: Any, bucket: int, recompute: bool) -> Trainee:
    """The tiny model in stage 3, gathered as a large one is."""
    stage = stage_by_number(3)
    model = make_model(stage)
    if recompute:
        model.gradient_checkpointing_enable()
    policy = read_policy("zero3")
    policy["zero_optimization"] |= {**LARGE_MODEL, "stage3_prefetch_bucket_size": bucket}
    path = ranks.folder / f"ahead.{ranks.world.rank}.json"
    path.write_text(json.dumps(policy))
    return make_trainee(ranks, stage=stage, zero=str(path), model=model, config=config_for(2))


LINK = 0.01
"""Seconds that the emulated link takes for each gather."""
TOKENS, TEXTS = 256, 8
"""Of a rank's batch: layers then take longer than the link."""


class SlowLink:
    """Delivers gathers one after another, each `LINK` seconds after all ranks asked and the one before came."""

    def __init__(self) -> None:
        self.gathers = 0
        self.waited = 0.0
        """Seconds that this rank stood still while the link was busy with what it needed."""
        self.free = 0.0

    def slowed(self, gather: Callable[..., Any]) -> Callable[..., Any]:
        """An asynchronous gather whose result comes over this link."""

        def ask(*arguments: Any, **options: Any) -> Any:
            self.gathers += 1
            return _Delayed(gather(*arguments, **options), self)

        return ask


class _Delayed:
    def __init__(self, work: Any, link: SlowLink) -> None:
        self._work, self._link = work, link
        self._arrival = threading.Event(), [0.0]
        work.get_future().add_done_callback(self._all_asked)

    def _all_asked(self, future: Any) -> None:
        done, arrival = self._arrival
        arrival[0] = self._link.free = max(self._link.free, time.perf_counter()) + LINK
        done.set()

    def wait(self) -> None:
        self._work.wait()
        done, arrival = self._arrival
        done.wait()
        left = arrival[0] - time.perf_counter()
        if left > 0:
            time.sleep(left)
            self._link.waited += left


def check_waits(ranks: Any) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of stage 3 that gathers take on an emulated link, and that rank 0 waits, by bucket."""
    return {f"bucket {bucket}": waits(ranks, bucket) for bucket in BUCKETS}


def waits(ranks: Any, bucket: int) -> dict[str, float]:
    trainee = make_large(ranks, bucket, recompute=False)
    batches = [stretched(step_batches(ranks, 0, 1)[0], TOKENS, TEXTS)]
    for _ in range(STEPS - 1):
        run_step(ranks, trainee, batches)
    link = SlowLink()
    with patch.object(partition_parameters, "_dist_allgather_fn", link.slowed(partition_parameters._dist_allgather_fn)):
        start = time.perf_counter()
        for _ in range(STEPS):
            run_step(ranks, trainee, batches)
        seconds = time.perf_counter() - start
    trainee.engine.close()
    return {
        "step": 1e3 * seconds / STEPS,
        "gathers": link.gathers / STEPS,
        "on the link": 1e3 * link.gathers * LINK / STEPS,
        "waited": 1e3 * link.waited / STEPS,
    }
