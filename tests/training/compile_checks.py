"""Checks of compiled blocks under DeepSpeed, by Inductor; `test_compiled_ranks` runs them on 2 ranks."""

from __future__ import annotations

from typing import Any

import torch
from stage_helpers import config_for, make_model, make_trainee, run_step, step_batches
from torch._dynamo.utils import counters

from hive_ds.model.compiling import compile_blocks
from hive_ds.stages import stage_by_number

IMAGES = ((2, 1, 1, 2), (1, 0, 0, 1), (1, 1, 2, 0), (3, 1, 1, 3), (0, 1, 1, 1), (1, 2, 0, 0))
"""Of each step. The first steps have 3, 1 and 2 images on each rank: one alone is a graph of its own to torch.compile.
Texts have other lengths in every step."""
WARM = 3
"""Steps after which nothing may be compiled any more."""


def trained(ranks: Any, zero: int, precision: str, *, compiled: bool) -> tuple[list[list[float]], list[int]]:
    """Loss and gradient norms of every step, and the graphs compiled until then."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(3)
    stage = stage_by_number(3)
    model = make_model(stage)
    if compiled:
        compile_blocks(model, torch.device("cpu"), torch.float32)
    trainee = make_trainee(ranks, stage=stage, zero=zero, precision=precision, model=model, config=config_for(2))
    rows, graphs = [], []
    for step, images in enumerate(IMAGES):
        loss, report = run_step(ranks, trainee, step_batches(ranks, step, 2, images))
        rows.append([loss, *report.grad_norms.values()])
        graphs.append(counters["stats"]["unique_graphs"])
    trainee.engine.close()
    return rows, graphs


def expect_same(ranks: Any, zeros: tuple[int, ...], precision: str, **tolerance: float) -> None:
    plain = trained(ranks, 0, "fp32", compiled=False)[0]
    for zero in zeros:
        rows, graphs = trained(ranks, zero, precision, compiled=True)
        assert graphs[WARM - 1] == graphs[-1], (zero, graphs)
        assert 0 < graphs[-1] <= 12, (zero, graphs)
        torch.testing.assert_close(torch.tensor(rows), torch.tensor(plain), **tolerance)


def check_fp32(ranks: Any) -> None:
    """As near to the uncompiled steps as other splits of the batch are (`test_engine`): only sums differ in order."""
    expect_same(ranks, (0, 1, 2), "fp32", rtol=1e-5, atol=1e-5)


def check_bf16(ranks: Any) -> None:
    """As near to fp32 as uncompiled bf16 is (`test_engine`)."""
    expect_same(ranks, (2,), "bf16", rtol=2e-2, atol=2e-3)
