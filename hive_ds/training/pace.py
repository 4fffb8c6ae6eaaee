"""Which rank holds the others up: a slow processor or slow data, compared over all ranks.

Under ZeRO-3 ranks wait for each other in every module, so the time of a forward pass is the same on all and names
nobody. Two things are a rank's own: how long it takes for a matrix product, and how long it waits for its data.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from statistics import median_low
from typing import Any

import torch

from hive_ds.constants import SLOW_RATIO
from hive_ds.training.distributed import World, all_values, sum_over_ranks
from hive_ds.training.flops import matmul_times

PROBE_SECONDS = 60.0
"""Between two timings of matrix products."""
SLOW_SECONDS = 180.0
"""It is warned of one that has been so for so long, and for `SLOW_LINES` log lines."""
SLOW_LINES = 5
REPEAT_SECONDS = 3600.0
"""Between two warnings of the same rank."""


class Pace:
    """Compares ranks at each log line.

    Args:
        world: this process among all.
        device: what computes.
        dtype: of the weights.
    """

    def __init__(self, world: World, device: torch.device, dtype: torch.dtype) -> None:
        self._world, self._device, self._dtype = world, device, dtype
        self._hosts: list[str] = all_values(socket.gethostname())
        self._probe()
        self._wait, self._steps = 0.0, 0
        self._slow: tuple[int, str] | None = None
        self._since, self._lines = 0.0, 0
        self._warned: dict[int, float] = {}
        """When each rank was last warned of."""

    def add(self, wait: float) -> None:
        """One more step, for whose data this rank waited so many seconds."""
        self._wait += wait
        self._steps += 1

    def compare(self, seconds_per_step: float, warn: Callable[[str], None]) -> dict[str, Any]:
        """The slowest rank since the last call, for a ``train`` line; every rank calls it.

        Args:
            seconds_per_step: mean since the last call.
            warn: prints; rank 0 hears of a rank that stays slow.
        """
        if time.monotonic() - self._probed >= PROBE_SECONDS:
            self._probe()
        size, rank = self._world.size, self._world.rank
        own = [0.0] * (2 * size)
        own[rank], own[size + rank] = self._compute, self._wait / max(self._steps, 1)
        shared = sum_over_ranks(own, self._device)
        self._wait, self._steps = 0.0, 0
        found = slowest(shared[:size], shared[size:], seconds_per_step)
        if self._world.is_main:
            self._watch(found, warn)
        return found

    def _probe(self) -> None:
        # Their sum, not the best: a core that other processes use is slow on the whole only.
        self._compute, self._probed = sum(matmul_times(self._device, self._dtype)), time.monotonic()

    def _watch(self, found: dict[str, Any], warn: Callable[[str], None]) -> None:
        now = time.monotonic()
        slow = (found["slowest_rank"], found["slowest_by"]) if found["slowest_ratio"] >= SLOW_RATIO else None
        if slow != self._slow:
            self._slow, self._since, self._lines = slow, now, 0
        self._lines += 1
        lasting = self._lines >= SLOW_LINES and now - self._since >= SLOW_SECONDS
        if slow and lasting and now - self._warned.get(slow[0], -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._warned[slow[0]] = now
            warn(
                f"warning: rank {slow[0]} on {self._hosts[slow[0]]} is slow in {slow[1]}: a step takes "
                f"{found['slowest_ratio']:.2f} times as long as with the median rank"
            )


def slowest(compute: list[float], waits: list[float], seconds_per_step: float) -> dict[str, Any]:
    """The rank that holds the others up most.

    Args:
        compute: time of a matrix product by rank, in any unit; a step is taken to be as much slower as that is.
        waits: seconds a step that each rank waits for data; what it waits longer than the median rank, all wait.
        seconds_per_step: the same on all ranks.
    """
    usual_compute, usual_wait = median_low(compute), median_low(waits)
    ratios = [(own / usual_compute, rank, "compute") for rank, own in enumerate(compute)]
    for rank, wait in enumerate(waits):
        others = max(seconds_per_step - (wait - usual_wait), 0.01 * seconds_per_step)
        ratios.append((seconds_per_step / others, rank, "data"))
    ratio, rank, cause = max(ratios, key=lambda entry: entry[0])
    return {"slowest_rank": rank, "slowest_ratio": ratio, "slowest_by": cause}
