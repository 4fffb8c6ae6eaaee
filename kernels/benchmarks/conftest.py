"""Collects what the tests measure, prints one table at the end and writes one result file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from . import measuring, records, render, timing
from .shapes import SHAPES, tiny

BUDGET = float(os.environ.get("HIVE_BENCH_SECONDS", "inf"))
"""No timing begins later than so many seconds after the start: a suite with a limit still ends with its table."""


def target() -> tuple[torch.device, torch.dtype]:
    """Where and in what dtype to measure."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0), torch.bfloat16
    return torch.device("cpu"), torch.float32


@dataclass
class Bench:
    """What has been measured so far."""

    started: float = field(default_factory=time.perf_counter)
    measured: dict[str, measuring.Measurement] = field(default_factory=dict)
    shapes: dict[str, records.Record] = field(default_factory=dict)
    rows: list[records.Record] = field(default_factory=list)
    record: records.Record = field(default_factory=dict)

    @property
    def overdue(self) -> bool:
        """Whether the budget is used up."""
        return time.perf_counter() - self.started > BUDGET

    def measure_ceilings(self) -> None:
        """Once, before anything is timed: checks alone need no rates, and many of them may run side by side."""
        if "ceilings" not in self.record:
            self.record["ceilings"] = timing.ceilings(*target())
            torch.cuda.empty_cache()

    def measurement(self, name: str) -> measuring.Measurement:
        """The shape's, made anew when another was asked for last: inputs of all would not fit."""
        if name not in self.measured:
            self.measured.clear()
            shape = SHAPES[name] if torch.cuda.is_available() else tiny(SHAPES[name])
            self.measured[name] = measuring.Measurement(shape, *target())
            self.shapes[name] = self.measured[name].summary()
        return self.measured[name]


BENCH = pytest.StashKey[Bench]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BENCH] = Bench()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The shapes that HIVE_BENCH_SHAPES names, and all of a shape before the next: its inputs are made once."""
    order = list(SHAPES)
    wanted = os.environ.get("HIVE_BENCH_SHAPES", "").replace(",", " ").split() or order
    if unknown := set(wanted) - set(order):
        raise pytest.UsageError(f"HIVE_BENCH_SHAPES names {', '.join(sorted(unknown))}; known are {', '.join(order)}")
    shapes = {item: str(item.callspec.params["shape"]) for item in items if hasattr(item, "callspec")}
    kept = [item for item in items if shapes.get(item, "") in wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(kept, key=lambda item: order.index(shapes[item]))


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Iterator[Bench]:
    """The run: settings that all timing needs, and the result file at the end."""
    collected = pytestconfig.stash[BENCH]
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 512)  # beyond it, compiled code would silently run uncompiled
    collected.record = records.describe("benchmark") | {"tiny": not torch.cuda.is_available()}
    with timing.backward_can_run_twice():
        yield collected
    if collected.rows:
        collected.record |= {"shapes": collected.shapes, "rows": collected.rows}
        collected.record["file"] = str(records.write(collected.record))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, and where it is kept."""
    record = config.stash[BENCH].record
    if "rows" not in record:
        return
    terminalreporter.section("hierarchical attention")
    terminalreporter.write(render.table(record))
    terminalreporter.write_line(f"\nresult file: {record['file']}")
