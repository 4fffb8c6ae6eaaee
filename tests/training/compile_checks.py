"""Checks of compiled blocks under DeepSpeed, by Inductor; `test_compiled_ranks` runs them on 2 ranks (long)."""

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
MOST_GRAPHS = 15
"""Of all kinds of pieces. Two are the encoder's, runs of one and of two blocks, each for 3, for 1, for any images."""
WARM = 3
"""Steps after which nothing may be compiled any more."""


def trained(ranks: Any, zero: int | str, precision: str, *, backend: str | None) -> tuple[list[list[float]], list[int]]:
    """Loss and gradient norms of every step, and the graphs compiled until then."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(3)
    stage = stage_by_number(3)
    model = make_model(stage)
    if backend:
        compile_blocks(model, torch.device("cpu"), torch.float32, backend, apart=zero == 3)
    trainee = make_trainee(ranks, stage=stage, zero=zero, precision=precision, model=model, config=config_for(2))
    rows, graphs = [], []
    for step, images in enumerate(IMAGES):
        loss, report = run_step(ranks, trainee, step_batches(ranks, step, 2, images))
        rows.append([loss, *report.grad_norms.values()])
        graphs.append(counters["stats"]["unique_graphs"])
    trainee.engine.close()
    return rows, graphs


def expect_same(
    ranks: Any, zeros: tuple[int | str, ...], precision: str, backend: str = "inductor", **tolerance: float
) -> None:
    """Losses and gradient norms of ``zeros`` compiled are those of plain steps; nothing is compiled later on."""
    plain = trained(ranks, 0, "fp32", backend=None)[0]
    for zero in zeros:
        rows, graphs = trained(ranks, zero, precision, backend=backend)
        assert graphs[WARM - 1] == graphs[-1], (zero, graphs)
        assert 0 < graphs[-1] <= MOST_GRAPHS, (zero, graphs)
        torch.testing.assert_close(torch.tensor(rows), torch.tensor(plain), **tolerance)


def check_fp32(ranks: Any) -> None:
    """As near to the uncompiled steps as other splits of the batch are (`test_engine`): only sums differ in order."""
    expect_same(ranks, (0, 1, 2), "fp32", rtol=1e-5, atol=1e-5)


def check_zero3(ranks: Any) -> None:
    """Layer by layer, as a large model is gathered, and whole."""
    expect_same(ranks, (3, "zero3"), "fp32", rtol=1e-5, atol=1e-5)


def check_no_weight_is_kept_for_backward(ranks: Any) -> None:
    """What a compiled piece saves is the parameter, which ZeRO-3 lets go and brings again, and no view of it."""
    stage = stage_by_number(3)
    model = make_model(stage)
    torch._dynamo.reset()
    compile_blocks(model, torch.device("cpu"), torch.float32, apart=True)
    trainee = make_trainee(ranks, stage=stage, zero=3, model=model, config=config_for(2))
    run_step(ranks, trainee, step_batches(ranks, 0, 2, IMAGES[0]))
    engine, kept, parameters = trainee.engine, [], 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal parameters
        gathered = {x.untyped_storage().data_ptr(): name for name, x in engine.model.named_parameters() if x.numel()}
        if isinstance(tensor, torch.nn.Parameter):
            parameters += 1
        elif tensor.untyped_storage().data_ptr() in gathered:
            kept.append((gathered[tensor.untyped_storage().data_ptr()], tuple(tensor.shape)))
        return tensor

    inputs = step_batches(ranks, 1, 2, IMAGES[3])[0].model_inputs(ranks.device, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine.forward(**inputs, num_items_in_batch=1).loss
    engine.backward(loss, last=True)
    engine.step(1.0)
    engine.close()
    assert parameters > 20
    assert kept == []


def check_bf16(ranks: Any) -> None:
    """As near to fp32 as uncompiled bf16 is (`test_engine`)."""
    expect_same(ranks, (2, 3), "bf16", rtol=2e-2, atol=2e-3)
