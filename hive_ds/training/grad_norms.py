"""Norms of the averaged gradients that DeepSpeed holds, by module group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hive_ds.training.distributed import sum_over_ranks
from hive_ds.training.groups import OptimizerGroup


def grad_norms(
    optimizer: Any, groups: Sequence[OptimizerGroup], zero_stage: int, device: torch.device
) -> dict[str, float]:
    """Norm of each module group; the same number on every rank, NaN or infinite as soon as one element is.

    Args:
        optimizer: DeepSpeed's, after backward.
        groups: of it, in its order.
        zero_stage: 0 to 3.
        device: of the gradients' norms.
    """
    names = list(dict.fromkeys(group.module_group for group in groups))
    squares = torch.zeros(len(names), dtype=torch.float64, device=device)
    for index, gradients in _local_gradients(optimizer, groups, zero_stage):
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
            squares[names.index(groups[index].module_group)] += norms.double().square().sum()
    if zero_stage:  # each rank holds its part; under ZeRO 0 each holds all
        squares = torch.tensor(sum_over_ranks(squares, device))
    return dict(zip(names, squares.sqrt().tolist(), strict=True))


def _local_gradients(
    optimizer: Any, groups: Sequence[OptimizerGroup], zero_stage: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """(index of an optimizer group, this rank's part of its averaged gradients, or the norms of these parts)."""
    to_group = getattr(optimizer, "sub_group_to_group_id", {})
    if zero_stage == 0:
        for index, group in enumerate(groups):
            yield index, [p.grad for p in group.parameters.values() if p.grad is not None]
    elif getattr(optimizer, "offload_optimizer", False):  # gradients are in CPU memory, their norms still on the device
        for parameter_id, norm in optimizer.norm_for_param_grads.items():
            yield to_group[optimizer.grad_position[parameter_id][0]], [norm.float()]
    else:
        for index, gradients in optimizer.averaged_gradients.items():
            yield to_group.get(index, index), [gradient for gradient in gradients if gradient is not None]
