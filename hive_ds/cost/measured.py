"""A training step of a stage on this machine, timed, with random weights, beside the computed figures."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from hive_ds.config import Recipe
from hive_ds.cost.model import random_model
from hive_ds.cost.workload import Workload
from hive_ds.model.attention_backends import set_vision_attention
from hive_ds.model.compiling import compile_blocks
from hive_ds.training.groups import adamw

WARM_UP = 3


@dataclass(frozen=True)
class MeasuredStep:
    """Forward, backward and AdamW of one micro-batch on one device, without ZeRO."""

    device: str
    seconds: float
    """Median."""
    peak_bytes: int | None
    """Most memory that tensors held; None on a CPU, which does not count it."""


def measure_step(recipe: Recipe, stage: int, workload: Workload, device: torch.device, steps: int = 10) -> MeasuredStep:
    """Time ``steps`` steps, after some that are not counted, in the recipe's precision, with its attention and loss."""
    model, plan = random_model(recipe, stage, device)
    model.language_loss.backend = recipe.model.language_loss
    set_vision_attention(model, recipe.model.vision_attention)
    if recipe.training.compile:
        compile_blocks(model, device, model.dtype)
    optimizer = adamw(plan.groups, recipe.stages[plan.stage.name], fused=device.type == "cuda")
    inputs, on_gpu = workload.inputs(model, device), device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name(device) if on_gpu else device.type
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return MeasuredStep(name, statistics.median(seconds[WARM_UP:]), peak)
