"""What real runs send, collective by collective: `test_communication` and `docs/results/communication.py` run these."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from communication_cases import CASES, FIRST, QUICK, SCALED, Case
from message_counter import MessageCounter, tally
from tiny_run import TinyRun

from hive_ds import train
from hive_ds.stages import stage_by_number
from hive_ds.training.distributed import barrier
from hive_ds.training.loop import here
from hive_ds.training.watchdog import stop_watching

STEPS = 4
COUNTED = 3
"""The step that is counted, from 1: ZeRO-3 has learned the order of modules, and nothing is saved yet."""


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


def counted_run(ranks: Any, recipe: Path, run: Path, case: Case) -> dict[str, Any]:
    """Train a stage in this launch, by the command's own code; collectives of one step, and the mean loss of all."""
    stage = stage_by_number(case.stage)
    settings = (
        *("training.validation_interval=0", "training.checkpoint_interval=0"),
        *("training.log_interval=100", "training.tensorboard=false"),
        *case.overrides(recipe.parent),
    )
    steps = f"stages.{stage.name}.steps={STEPS}"
    options = argparse.Namespace(
        recipe=str(recipe),
        stage=str(case.stage),
        run=str(run),
        debug=False,
        no_next=True,
        local_rank=None,
        set=[*settings, steps],
    )
    counter = _StepCounter()
    with ExitStack() as stack:
        stack.enter_context(patch.object(train, "start", lambda *_: ranks.device))
        stack.enter_context(patch.object(here, "begin_step", counter.begin))
        stack.enter_context(counter)
        assert train.train(options, ranks.world)
    stop_watching()
    lines = (run / f"stage{case.stage}" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if line["event"] == "train"]
    return {"tally": tally(counter.messages), "loss": losses[-1]}


def check_communication(ranks: Any) -> dict[str, Any]:
    """Count every case that this number of ranks can run."""
    return _count(ranks, CASES)


def check_quick(ranks: Any) -> dict[str, Any]:
    """Count each way of communicating once."""
    return _count(ranks, QUICK)


def check_scaling(ranks: Any) -> dict[str, Any]:
    """Count the cases that more ranks than that run too."""
    return _count(ranks, SCALED)


def _count(ranks: Any, cases: Sequence[Case]) -> dict[str, Any]:
    root = ranks.folder / "tiny"
    if ranks.world.is_main:
        TinyRun.make(root)
    barrier()
    start, counted = root / "start", {}
    for case in cases:
        if ranks.world.size % (case.per_copy or 1):
            continue
        run = start if case in FIRST else root / case.name.replace(" ", "-")
        if ranks.world.is_main and case not in FIRST:
            run.mkdir()
            if case.stage == 3:
                (run / "stage2").symlink_to(start / "stage2")
        if ranks.world.is_main:
            case.file(root)
        barrier()
        counted[case.name] = counted_run(ranks, root / "recipe.yaml", run, case)
    return counted
