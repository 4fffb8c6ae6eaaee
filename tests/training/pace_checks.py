"""Checks of how ranks are compared; `test_loop_on_ranks` runs them on 2 ranks."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from hive_ds.training import pace
from hive_ds.training.distributed import barrier
from hive_ds.training.pace import Pace

HOLD_UP = """
import os, select, signal, time
rank = os.getppid()
while not select.select([0], [], [], 0.001)[0]:
    os.kill(rank, signal.SIGSTOP)
    time.sleep(0.03)
    os.kill(rank, signal.SIGCONT)
"""


@contextmanager
def held_up() -> Iterator[None]:
    """Let this process run for a thirtieth of the time, whatever else runs on its core."""
    other = subprocess.Popen([sys.executable, "-S", "-c", HOLD_UP], stdin=subprocess.PIPE)
    assert other.stdin is not None
    try:
        yield
    finally:
        other.stdin.close()  # its end comes after a SIGCONT
        other.wait()


def stays_slow(found: list[dict[str, Any]], rank: int) -> bool:
    """Whether the last lines, as many as a warning takes, name ``rank`` as more than twice as slow."""
    lines = found[-pace.SLOW_LINES :]
    named = [
        (one["slowest_rank"], one["slowest_by"]) == (rank, "compute") and one["slowest_ratio"] > 2 for one in lines
    ]
    return len(named) == pace.SLOW_LINES and all(named)


def check_slow_rank(ranks: Any) -> None:
    """A rank that gets little of its core, and then one that waits for data, is named; rank 0 warns in the end."""
    before = pace.PROBE_SECONDS, pace.SLOW_SECONDS
    last = ranks.world.size - 1
    pace.PROBE_SECONDS, pace.SLOW_SECONDS = 0.0, 0.0
    warnings: list[str] = []
    compared = Pace(ranks.world, ranks.device, torch.float32)
    with held_up() if ranks.world.rank == last else nullcontext():
        barrier()
        # On a busy machine the other may be as slow for a moment; a warning takes so many lines without that.
        found: list[dict[str, Any]] = []
        while not stays_slow(found, last) and len(found) < 8 * pace.SLOW_LINES:
            found.append(compared.compare(1.0, warnings.append))
        barrier()
    assert stays_slow(found, last), found
    assert bool(warnings) == (ranks.world.rank == 0), warnings
    if warnings:
        said = f"warning: rank {last} on {socket.gethostname()} is slow in compute: a step takes"
        assert any(line.startswith(said) for line in warnings), warnings  # a busy machine may have slowed the other too
    compared.add(0.9 if ranks.world.rank == last else 0.0)
    pace.PROBE_SECONDS = 3600.0
    compared._compute = 1.0
    one = compared.compare(1.0, warnings.append)
    assert one == {"slowest_rank": last, "slowest_ratio": 1.0 / (1.0 - 0.9), "slowest_by": "data"}, one
    pace.PROBE_SECONDS, pace.SLOW_SECONDS = before
