"""Which rank is called slow, and how often it is warned of; `pace_checks` has it on ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hive_ds.training import pace
from hive_ds.training.distributed import World
from hive_ds.training.pace import Pace, slowest


class Pair:
    """Rank 0 of two, beside a rank 1 that is told how slow it is; a clock that is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.compute, self.warned = 0.0, 1.0, list[str]()
        monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(pace, "all_values", lambda _: ["node1", "node2"])
        monkeypatch.setattr(pace, "matmul_times", lambda device, dtype: [1.0])
        monkeypatch.setattr(pace, "sum_over_ranks", lambda own, device: [own[0], self.compute, own[2], 0.0])
        self.pace = Pace(World(0, 0, 2, 1), torch.device("cpu"), torch.float32)

    def line(self, compute: float = 1.0) -> dict[str, object]:
        """A log line, where a product takes ``compute`` times as long on rank 1."""
        self.compute = compute
        return self.pace.compare(1.0, self.warned.append)

    def warned_at(self, seconds: int, slow: list[float]) -> list[float]:
        """When it is warned over so many lines, one every ``seconds``, of products that take so long on rank 1."""
        found = []
        for compute in slow:
            before = len(self.warned)
            self.line(compute)
            found += [self.now] * (len(self.warned) - before)
            self.now += seconds
        return found


@pytest.mark.parametrize(
    ("seconds", "slow", "warned"),
    [
        (30, [1.5] * 130, [180, 3780]),  # for three minutes, and then once an hour
        (100, [1.5] * 10, [400]),  # for five lines
        (60, [1.5] * 4 + [1.0] + [1.5] * 5, [540]),  # it was not for so long before
        (60, ([1.5] * 5 + [1.0]) * 11, [240, 3840]),  # now and then, for long
        (60, [1.2] * 100, []),
    ],
)
def test_a_slow_rank_is_warned_of_once_an_hour(
    seconds: int, slow: list[float], warned: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(monkeypatch)
    assert pair.warned_at(seconds, slow) == warned
    said = "warning: rank 1 on node2 is slow in compute: a step takes 1.50 times as long as with the median rank"
    assert pair.warned == [said] * len(warned)


def test_each_slow_rank_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch)
    assert pair.warned_at(60, [1.5] * 5 + [0.5] * 5) == [240, 540]
    assert [line.split(" is slow")[0] for line in pair.warned] == [
        "warning: rank 1 on node2",
        "warning: rank 0 on node1",
    ]


def test_products_are_timed_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them count: a core that another program takes now and then is slow on the whole only."""
    pair = Pair(monkeypatch)
    found = []
    for now, times in ((59.0, [1.0, 2.0]), (60.0, [1.0, 2.0]), (119.0, [1.0]), (120.0, [1.0])):
        pair.now = now
        monkeypatch.setattr(pace, "matmul_times", lambda device, dtype, times=times: times)
        found.append(pair.line()["slowest_ratio"])
    assert found == [1.0, 3.0, 3.0, 1.0]


def test_waits_are_the_mean_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch)
    for wait in (0.9, 0.1):
        pair.pace.add(wait)
    assert pair.line() == {"slowest_rank": 0, "slowest_ratio": 2.0, "slowest_by": "data"}
    assert pair.line()["slowest_ratio"] == 1.0
    pair.pace.add(0.2)
    assert pair.line()["slowest_ratio"] == pytest.approx(1 / 0.8)


@pytest.mark.parametrize(
    ("compute", "waits", "expected"),
    [
        ([2.0, 2.0, 3.0, 2.0], [0.0] * 4, (2, 1.5, "compute")),
        ([2.0, 2.0, 3.0, 2.0], [0.1, 0.6, 0.1, 0.1], (1, 2.0, "data")),  # all wait 0.1 s
        ([1.0, 1.0], [0.0, 5.0], (1, 100.0, "data")),  # at most
        ([1.0], [0.5], (0, 1.0, "compute")),
    ],
)
def test_slowest(compute: list[float], waits: list[float], expected: tuple[int, float, str]) -> None:
    rank, ratio, by = expected
    found = {"slowest_rank": rank, "slowest_ratio": pytest.approx(ratio), "slowest_by": by}
    assert slowest(compute, waits, 1.0) == found
