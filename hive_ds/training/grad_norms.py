"""Squared norms of the averaged gradients that DeepSpeed holds, by module group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hive_ds.training.groups import OptimizerGroup


def gradient_squares(
    optimizer: Any, groups: Sequence[OptimizerGroup], zero_stage: int, *, is_main: bool, device: torch.device
) -> Tensor:
    """This rank's share of each module group's squared norm: the sum over all ranks is the whole of it.

    Args:
        optimizer: DeepSpeed's, after backward.
        groups: of it, in its order.
        zero_stage: 0 to 3.
        is_main: this rank is the one that answers for all where each holds every gradient (ZeRO 0).
        device: of the gradients' norms.

    Returns:
        fp64 (module groups,), in the order of `module_group_names`; NaN or infinite as soon as one element is.
    """
    names = module_group_names(groups)
    squares = torch.zeros(len(names), dtype=torch.float64, device=device)
    if zero_stage == 0 and not is_main:
        return squares
    for index, gradients in _local_gradients(optimizer, groups, zero_stage):
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
            squares[names.index(groups[index].module_group)] += norms.double().square().sum()
    return squares


def module_group_names(groups: Sequence[OptimizerGroup]) -> list[str]:
    """The module groups of ``groups``, each once, in order."""
    return list(dict.fromkeys(group.module_group for group in groups))


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
