"""``hive_ds.train`` that also writes down what it did: ``kill_main.py FILE ARGUMENTS``.

Rank 0 appends to FILE a line for the checkpoint that it resumed from, and a line a step: sample ids of all
ranks, loss.
"""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

import hive_ds.train
import hive_ds.training.loop as loop
from hive_ds.training.distributed import all_values, sum_over_ranks

run_loop, run_micro_batches, load_checkpoint = loop.train, loop.run_micro_batches, hive_ds.train.load_checkpoint


file = Path()


def write(values: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(f"{json.dumps(values)}\n")


def load_and_write(path: Path, state: Any, engine: Any, world: Any) -> None:
    if world.is_main:
        write({"resumed": path.name, "manifest": json.loads((path / "manifest.json").read_text())})
    load_checkpoint(path, state, engine, world)


def train_and_write(job: Any, first_step: int) -> int:
    steps = count(first_step + 1)

    def run_and_write(engine: Any, micro_batches: Any, supervised: float) -> Tensor:
        loss = run_micro_batches(engine, micro_batches, supervised)
        mean = sum_over_ranks(loss[None], engine.device)[0] / engine.world.size
        ids = all_values([name for batch in micro_batches for name in batch.sample_ids])
        if job.world.is_main:
            write({"step": next(steps), "ids": ids, "loss": mean})
        return loss

    loop.run_micro_batches = run_and_write
    return run_loop(job, first_step)


def main(arguments: list[str]) -> int:
    global file
    file = Path(arguments[0])
    hive_ds.train.load_checkpoint = load_and_write
    hive_ds.train.run_loop = train_and_write
    return hive_ds.train.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
