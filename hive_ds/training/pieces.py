"""Weights and AdamW's state of a partitioned model, in pieces that say which part of which parameter they are.

ZeRO cuts parameters up by the number of ranks, each stage in its own way. A piece is named by its parameter and where
in it, flattened, it begins; so what one number of ranks has saved, any other can read: every rank looks up the parts it
needs. The master weights are kept in fp32 whatever the model computes in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hive_ds.training.groups import OptimizerGroup

STATE = ("weight", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: its fp32 weight and AdamW's two moments."""


@dataclass(frozen=True)
class Piece:
    """A rank's part of one parameter: ``count`` elements from ``start`` on."""

    name: str
    start: int
    count: int
    values: Mapping[str, Tensor]
    """`STATE` -> fp32 (count,), the optimizer's own memory: what is written there is restored."""


def own_pieces(optimizer: Any, base: torch.optim.Optimizer, groups: Sequence[OptimizerGroup]) -> Iterator[Piece]:
    """This rank's pieces of every trained parameter.

    Args:
        optimizer: DeepSpeed's, or ``base`` itself where it wraps none.
        base: torch's AdamW, which DeepSpeed gives flat fp32 partitions to step.
        groups: trained parameters by name.
    """
    # ZeRO 0 in bf16 keeps an fp32 copy of each parameter, in lists that run side by side.
    lists = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    masters = {id(low): high for lows, highs in lists for low, high in zip(lows, highs, strict=True)}
    for group in groups:
        for name, parameter in group.parameters.items():
            found = _locate(optimizer, base, parameter, masters)
            if found is not None:
                flat, at, start, count = found
                state = base.state[flat]
                values = {"weight": flat.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
                yield Piece(name, start, count, {key: x.view(-1).narrow(0, at, count) for key, x in values.items()})


def _locate(
    optimizer: Any, base: torch.optim.Optimizer, parameter: Any, masters: Mapping[int, Tensor]
) -> tuple[Tensor, int, int, int] | None:
    """Where AdamW keeps this rank's part of ``parameter``; None where it has none.

    Returns:
        The tensor that AdamW steps, the part's first element in it, the same in the parameter, and how many elements.
    """
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3
        index, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = parameter.ds_tensor.numel() * torch.distributed.get_rank()
        count = min(int(size), parameter.ds_numel - start)  # the last parts are padded
        return (optimizer.fp32_partitioned_groups_flat[index], int(at), start, count) if count > 0 else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = base.param_groups[mapping.param_group_index]["params"][0]
        held, part = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return flat, int(held.start), int(part.start), int(part.numel)
    return masters.get(id(parameter), parameter), 0, 0, parameter.numel()


def own_part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter, flattened, less the padding of ZeRO 3."""
    if not hasattr(parameter, "ds_tensor"):
        whole: Tensor = parameter.detach().view(-1)
        return whole
    part: Tensor = parameter.ds_tensor.detach().view(-1)
    return part[: max(0, parameter.ds_numel - part.numel() * torch.distributed.get_rank())]


def own_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers, children's left out, with full names."""
    buffers: OrderedDict[str, Tensor | None] = OrderedDict(
        (name, buffer) for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
    )
    for name, value in [*module._parameters.items(), *buffers.items()]:
        if value is not None:
            yield f"{prefix}.{name}" if prefix else name, value


def start_state(optimizer: Any, base: torch.optim.Optimizer, steps: int) -> None:
    """Give AdamW the state that it would have after ``steps`` steps, moments at zero, to be filled in.

    Each tensor gets a step counter of its own: AdamW counts in place, and a shared one would count once for each.
    """
    listed = [flat for group in base.param_groups for flat in group["params"]]
    # Between steps ZeRO 3 takes its partitions out of AdamW's groups.
    for flat in getattr(optimizer, "fp32_partitioned_groups_flat", listed):
        base.state[flat] = {
            "step": torch.tensor(float(steps), device=flat.device),  # where the fused AdamW looks for it
            "exp_avg": torch.zeros_like(flat.data),
            "exp_avg_sq": torch.zeros_like(flat.data),
        }


def publish_weights(parameter: Any, piece: Piece | None, whole: Tensor | None) -> None:
    """Put restored master weights where the model computes with them.

    Args:
        parameter: of the model.
        piece: this rank's, where parameters are partitioned (ZeRO 3).
        whole: (numel,) the whole parameter, where every rank holds it (ZeRO 0 to 2).
    """
    if whole is not None:
        parameter.data.view(-1).copy_(whole)
    elif piece is not None:
        parameter.ds_tensor.data.view(-1)[: piece.count].copy_(piece.values["weight"])
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None  # hpZ's copy within the node is made anew from what was restored
