"""Which part of ZeRO-3's gathered weights is asked for ahead of need; `test_gathers_ahead` runs it on 2 ranks."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from unittest.mock import patch

from communication_cases import LARGE_MODEL
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from stage_helpers import config_for, make_model, make_trainee, run_step, step_batches

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
    stage = stage_by_number(3)
    model = make_model(stage)
    if recompute:
        model.gradient_checkpointing_enable()
    policy = read_policy("zero3")
    policy["zero_optimization"] |= {**LARGE_MODEL, "stage3_prefetch_bucket_size": bucket}
    path = ranks.folder / f"ahead.{ranks.world.rank}.json"
    path.write_text(json.dumps(policy))
    trainee = make_trainee(ranks, stage=stage, zero=str(path), model=model, config=config_for(2))
    for step in range(STEPS - 1):
        run_step(ranks, trainee, step_batches(ranks, step, 2))
    watch = Watch()
    with watch.patches:
        run_step(ranks, trainee, step_batches(ranks, STEPS, 2))
    trainee.engine.close()
    return {"ahead": watch.elements["ahead"], "on demand": watch.elements["on demand"]}
