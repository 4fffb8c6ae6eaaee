"""Kill a process that saves at each file operation of the save in turn: ``main([FOLDER])``.

Below FOLDER, ``N/killed`` is what a kill at the Nth operation left, ``N/after`` the same after another process has
saved the next checkpoint there.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hive_ds.config import TrainingConfig
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint import RunIdentity
from hive_ds.training.checkpoint_writer import CheckpointWriter
from hive_ds.training.distributed import World, start
from hive_ds.training.pieces import STATE, Piece

SHAPES = {"a.weight": [5, 3], "b.bias": [7]}
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}


def stub_writer(folder: Path) -> CheckpointWriter:
    """A writer over an engine that holds numbers and nothing else; keeps two checkpoints."""
    generator = torch.Generator().manual_seed(0)
    pieces = [
        Piece(name, 0, count, {key: torch.randn(count, generator=generator) for key in STATE})
        for name, count in (("a.weight", 15), ("b.bias", 7))
    ]
    engine: Any = SimpleNamespace(
        zero_stage=3, skipped_steps=0, frozen_sums={}, trained_elements=22, pieces=lambda: pieces
    )
    identity = RunIdentity("connector_pretraining", "fp32", 0, 8, SHAPES, ["a", "b"], {})
    world = World()
    attempt = Attempt(folder, world, {"HIVE_ATTEMPT": "one"})
    attempt.sign()
    return CheckpointWriter(folder, engine, identity, {}, world, attempt, TrainingConfig(keep_checkpoints=2))


def save(folder: Path, *steps: int, prepare: Callable[[], None] = lambda: None) -> int:
    """Save in a process of its own; returns its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        start(World())
        writer = stub_writer(folder)
        prepare()
        for step in steps:
            writer.begin(step, {})
            report = writer.wait()
            assert report is not None
            assert report.failed is None, report
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(number: int, folder: Path) -> None:
    """Have this process killed before its operation of this number on a file below ``folder``."""
    seen = count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(str(folder)) and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    assert save(folder / "base", 1, 2) == 0
    for number in count(1):
        killed, after = folder / str(number) / "killed", folder / str(number) / "after"
        shutil.copytree(folder / "base", killed)
        code = save(killed, 3, prepare=lambda number=number, killed=killed: kill_at(number, killed))
        if code == 0:
            shutil.rmtree(killed.parent)
            break
        assert code == -signal.SIGKILL, code
        shutil.copytree(killed, after)
        assert save(after, 4) == 0
