"""What real runs send, collective by collective; `test_communication` and `docs/results/communication.py` run them."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tiny_run import TinyRun

from hive_ds import train
from hive_ds.planning.messages import Message, MessageCounter, tally
from hive_ds.training.distributed import barrier
from hive_ds.training.ds_config import read_policy
from hive_ds.training.loop import here
from hive_ds.training.watchdog import stop_watching

STEPS = 4
COUNTED = 3
"""The step that is counted, from 1: ZeRO-3 has learned the order of modules, and nothing is saved yet."""
LARGE_MODEL = {
    "stage3_param_persistence_threshold": 500,
    "stage3_prefetch_bucket_size": 5000,
    "stage3_max_reuse_distance": 20_000,
    "reduce_bucket_size": 20_000,
    "sub_group_size": 10_000,
}
"""Limits that are to the tiny model what DeepSpeed's are to a large one: weights come and go, buckets overflow."""


class _StepCounter(MessageCounter):
    """Counts one step of the loop, from its begin to the next one's."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def begin(self, step: int) -> None:
        self.step = step

    def _record(self, operator: str, args: tuple[Any, ...]) -> None:
        if self.step == COUNTED:
            super()._record(operator, args)


def counted_run(ranks: Any, recipe: Path, run: Path, stage: int, *overrides: str) -> list[Message]:
    """Train a stage in this launch, by the command's own code, and return the collectives of one step."""
    options = argparse.Namespace(
        recipe=str(recipe), stage=stage, run=str(run), debug=False, local_rank=None,
        set=["training.validation_interval=0", "training.checkpoint_interval=0", "training.log_interval=100",
             "training.tensorboard=false", f"stages.{train.stage_by_number(stage).name}.steps={STEPS}", *overrides],
    )  # fmt: skip
    with ExitStack() as stack:
        counter = _StepCounter()
        stack.enter_context(patch.object(train, "start", lambda *_: ranks.device))
        stack.enter_context(patch.object(here, "begin_step", counter.begin))
        stack.enter_context(counter)
        assert train.train(options, ranks.world)
    stop_watching()
    return counter.messages


@dataclass(frozen=True)
class Case:
    """One counted run."""

    stage: int
    policy: str
    large: bool = False
    """With `LARGE_MODEL`'s limits."""
    precision: str = "fp32"
    recompute: bool = True
    """Under gradient checkpointing."""
    per_copy: int = 0
    """hpZ's ranks per copy of the weights; 0 leaves the file's."""

    @property
    def name(self) -> str:
        """For people."""
        marks = (("large", self.large), ("stored", not self.recompute), (f"hpz{self.per_copy}", self.per_copy))
        return " ".join([f"stage{self.stage}", self.policy, self.precision, *(mark for mark, on in marks if on)])

    def settings(self) -> dict[str, Any]:
        """What it changes in ``zero_optimization``."""
        copy = {"zero_hpz_partition_size": self.per_copy} if self.per_copy else {}
        return copy | (LARGE_MODEL if self.large else {})

    def file(self, folder: Path) -> str:
        """Its policy as a file in ``folder``."""
        policy = read_policy(self.policy)
        policy["zero_optimization"] |= self.settings()
        path = folder / f"{self.name.replace(' ', '-')}.json"
        path.write_text(json.dumps(policy))
        return str(path)

    def overrides(self, folder: Path) -> list[str]:
        """What it changes in the recipe."""
        return [
            f"training.ds_config={self.file(folder)}",
            f"training.precision={self.precision}",
            f"model.gradient_checkpointing={str(self.recompute).lower()}",
        ]


FIRST = (Case(1, "zero3"), Case(2, "zero3", large=True))
"""They also train what the others start from."""
CASES = (
    *FIRST,
    *(Case(3, policy) for policy in ("zero0", "zero1", "zero2", "zero3")),
    *(Case(3, policy, precision="bf16") for policy in ("zero0", "zero1", "zero2")),
    *(Case(3, f"zero3_offload_{what}", large=True) for what in ("optimizer", "param")),
    Case(3, "zero2", large=True),
    Case(3, "zero3", large=True, precision="bf16"),
    Case(3, "zero3", large=True, recompute=False),
    Case(3, "zero3_hpz", large=True, per_copy=2),
    Case(3, "zero3_hpz", large=True, per_copy=2, recompute=False),
)


def check_communication(ranks: Any) -> dict[str, Any]:
    """Count every case that this number of ranks can run."""
    root = ranks.folder / "tiny"
    if ranks.world.is_main:
        TinyRun.make(root)
    barrier()
    start = root / "start"
    counted = {}
    for case in CASES:
        if ranks.world.size % (case.per_copy or 1):
            continue
        run = start if case in FIRST else root / case.name.replace(" ", "-")
        if ranks.world.is_main and case not in FIRST:
            run.mkdir()
            (run / "stage2").symlink_to(start / "stage2")
        barrier()
        messages = counted_run(ranks, root / "recipe.yaml", run, case.stage, *case.overrides(root))
        counted[case.name] = tally(messages)
    return counted
