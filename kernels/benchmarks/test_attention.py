"""`pytest kernels/benchmarks`: every peer is checked on every shape, then timed. A red peer is not timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from .peers import PEERS
from .shapes import DIRECTIONS, SHAPES
from .timing import eager_calls

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from .conftest import Bench

EAGER_CALLS, ROUNDS = (10, 3) if torch.cuda.is_available() else (1, 1)
"""Eager calls of one round, waited for together."""
OVERDUE = "the time set by HIVE_BENCH_SECONDS is used up; SHAPES=... times the rest in another run"
TIMED = [(shape.name, direction, peer) for shape in SHAPES.values() for direction in shape.directions for peer in PEERS]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(bench: Bench, shape: str, peer: str) -> None:
    if bench.overdue and shape not in bench.measured:
        pytest.skip(OVERDUE)
    assert bench.measurement(shape).verdict(peer) == "passed"


@pytest.mark.parametrize(("shape", "direction", "peer"), TIMED)
def test_time(bench: Bench, benchmark: BenchmarkFixture, shape: str, direction: str, peer: str) -> None:
    """The fixture times eager calls; the times of graph replays come from `Measurement`, all peers interleaved."""
    assert direction in DIRECTIONS
    if bench.overdue:
        pytest.skip(OVERDUE)
    bench.measure_ceilings()
    measurement = bench.measurement(shape)
    row = measurement.row(peer, direction)
    bench.rows.append(row)
    assert row["check"] == "passed", "a peer that fails its check is not timed"
    if "seconds" not in row:
        pytest.skip(row["note"])
    try:
        calls = eager_calls(measurement.peer(peer), direction, EAGER_CALLS)
        benchmark.pedantic(calls, rounds=ROUNDS, warmup_rounds=ROUNDS - 1)
    except torch.OutOfMemoryError:
        row["note"] = "eager calls: out of memory"
        pytest.skip(row["note"])
    if benchmark.stats is not None:
        row["eager_seconds"] = benchmark.stats.stats.median / EAGER_CALLS
    benchmark.extra_info |= row
