"""``hive_ds.train`` three times on a planted device: ``main([ARGUMENTS, ARGUMENTS])``, as JSON lists.

The first run is stopped after a step and gone on with, the second goes through. A line with its exit code follows each.
"""

from __future__ import annotations

import gc
import json
import os
from typing import Any

import torch

from hive_ds import train
from hive_ds.training import micro_batch
from hive_ds.training.distributed import start


class PlantedMemory:
    """A device on which micro-batches of 1 and 2 leave enough: each size that is tried takes as much more."""

    name, total = "planted", 100

    def __init__(self) -> None:
        self.steps = 0

    def used(self) -> int:
        self.steps += 1
        return 10

    def peak(self) -> int:
        return 10 + 25 * max(1, self.steps - 1)  # the first step is the warm-up

    def forget_peak(self) -> None: ...


def train_planted(arguments: list[str]) -> None:
    devices: list[PlantedMemory] = []

    def plant(*_: Any) -> PlantedMemory:
        devices.append(PlantedMemory())
        return devices[-1]

    micro_batch.device_memory = plant  # type: ignore[assignment]
    code = train.main(arguments)
    gc.collect()  # the run's loader, which keeps the cache to itself
    print(f"exit code {code}, steps of trials: {[device.steps for device in devices]}", flush=True)


def main(runs: list[str]) -> int:
    interrupted, straight = map(json.loads, runs)
    start(train.World())
    # DeepSpeed's groups are those of the first process group: it stays.
    train.start = lambda *_: torch.device("cpu")  # type: ignore[assignment]
    train.stop = lambda: None
    os.environ["HIVE_STOP_AT"] = "0"
    train_planted(interrupted)
    del os.environ["HIVE_STOP_AT"]
    train_planted(interrupted)
    train_planted(straight)
    return 0
