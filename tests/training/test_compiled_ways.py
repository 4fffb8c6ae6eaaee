"""The ways that the step benchmark times, compiled as on a GPU: each still computes what our plain step does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from hive_ds.benchmarks.arms import Setting, build_arm
from hive_ds.benchmarks.sizes import TINY, make_batch
from hive_ds.benchmarks.step import PROBES

WAYS = ("ours compiled", "paper", "sa", "sa packed")
CASES = [*((way, stage) for way in WAYS for stage in (1, 3)), ("ours zero3", 3)]
"""DeepSpeed starts once in a process."""
LENGTHS = ((4, 9, 6), (11, 3), (5, 5, 5), (32, 32), (2, 8, 7, 12))
"""Of the texts of batches; what is padded has a length that came before, and ones that did not."""


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.long
@pytest.mark.parametrize(("way", "stage"), CASES)
def test_compiled_by_inductor(way: str, stage: int) -> None:
    """On probes of two and three images, and then on lengths that were not seen before."""
    setting = Setting(TINY, stage, torch.device("cpu"), compiled=True)
    probes = [make_batch(TINY, [5, 9, 4][:count], 9) for count in PROBES]
    arm = build_arm(way, setting, probes)
    assert arm.check == "passed"
    assert counters["stats"]["unique_graphs"] > 0
    plain = build_arm("sa packed" if "sa" in way else "ours", replace(setting, compiled=False), probes)
    try:
        for seed, lengths in enumerate(LENGTHS):
            batch = make_batch(TINY, lengths, seed)
            assert float(arm.stepper.step(batch)) == pytest.approx(float(plain.stepper.step(batch)), rel=1e-4)
    finally:
        arm.close()
