"""Whether a way of training computes what our plain step does: its loss, and the gradient of every weight.

A loss and a norm would not do: with random weights, attention to the wrong tokens leaves both where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hive_ds.data.batch import PackedBatch
from hive_ds.training.groups import StagePlan

Loss = Callable[[PackedBatch, torch.device], Tensor]
"""Summed cross-entropy of a batch."""
LOSS_LIMITS = {torch.bfloat16: 5e-3, torch.float32: 1e-4}
"""Of the difference of two losses, relative."""
GRADIENT_LIMITS = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""Of the length of the difference of two gradients of all weights, relative to the gradient's. In bf16 rounding makes
0.02 of it at the paper's depth, and attention to the wrong tokens 0.13 and more with three layers, 0.86 at depth."""


@dataclass(frozen=True)
class Outcome:
    """What a batch gives."""

    loss: float
    """Mean over supervised tokens."""
    gradients: list[Tensor]
    """Of the weights that train, in the plan's order."""

    def kept_aside(self) -> Outcome:
        """The same with its gradients on the CPU."""
        return Outcome(self.loss, [gradient.cpu() for gradient in self.gradients])


def weights_of(plan: StagePlan) -> list[Tensor]:
    """All that trains."""
    return [weight for group in plan.groups for weight in group.parameters.values()]


def outcome(loss: Loss, plan: StagePlan, batch: PackedBatch, device: torch.device) -> Outcome:
    """Run ``loss`` forward and backward on a batch; the weights' own gradients are None afterwards."""
    mean = loss(batch, device) / batch.supervised_tokens
    mean.backward()
    weights = weights_of(plan)
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    return Outcome(float(mean.detach()), gradients)


def compared(found: Outcome, wanted: Outcome, dtype: torch.dtype) -> str:
    """ "passed" where ``found`` is ``wanted``, to the rounding of weights in ``dtype``; else what differs."""
    if not abs(found.loss - wanted.loss) <= LOSS_LIMITS[dtype] * abs(wanted.loss):
        return f"loss is {found.loss:.6g}, but that of our plain step is {wanted.loss:.6g}"
    apart, limit = distance(found.gradients, wanted.gradients), GRADIENT_LIMITS[dtype]
    if not apart <= limit:
        return f"gradients are {apart:.3g} of their length away from those of our plain step, expected at most {limit}"
    return "passed"


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Length of the difference of two gradients, each of all weights, as a share of the length of ``wanted``."""
    apart, length = 0.0, 0.0
    for one, other in zip(found, wanted, strict=True):
        reference = other.to(one.device, torch.float32)
        apart += float((one.float() - reference).square().sum())
        length += float(reference.square().sum())
    return (apart / length) ** 0.5 if length else float(apart > 0)
