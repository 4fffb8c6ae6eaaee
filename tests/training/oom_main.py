"""A step of the benchmark that runs out of memory in its backward pass; prints the steps before and after it."""

from __future__ import annotations

import json

import torch

from hive_ds.benchmarks.arms import Setting, build_arm
from hive_ds.benchmarks.sizes import TINY, make_batch


def main(arguments: list[str]) -> int:
    """The way ``arguments[0]``: prints the loss and what tells of the gradients, before and after, as JSON."""
    batch = make_batch(TINY, [5, 9], 0)
    arm = build_arm(arguments[0], Setting(TINY, 3, torch.device("cpu"), compiled=False), [batch])
    named = arm.model.vision_encoder.named_parameters()
    weight = next(weight for name, weight in named if name.endswith("layers.0.mlp.fc1.weight"))
    found = [measured(arm.stepper, batch)]
    planted = weight.register_hook(run_out)
    try:
        arm.stepper.step(batch)
    except torch.OutOfMemoryError:
        planted.remove()
        arm.forget()
        found.append(measured(arm.stepper, batch))
    arm.close()
    print(json.dumps(found))
    return 0


def run_out(_: torch.Tensor) -> None:
    """What the allocator does, when the gradients of the LLM and of later blocks are there already."""
    raise torch.OutOfMemoryError("planted")


def measured(stepper: object, batch: object) -> list[float]:
    """Loss of a step, and the norms of the gradients of each weight, which plain steps have clipped already."""
    if hasattr(stepper, "outcome"):
        found = stepper.outcome(batch)
        return [found.loss, *(float(gradient.norm()) for gradient in found.gradients)]
    loss = float(stepper.step(batch))  # type: ignore[attr-defined]
    return [loss, *(float(master.grad.norm()) for master in stepper.masters)]  # type: ignore[attr-defined]
