"""Optimizer groups: every trained parameter in exactly one, with its learning rate and decay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hive_ds.config import StageConfig
from hive_ds.errors import HiveError
from hive_ds.stages import ModuleGroup, Stage, assign_groups, cascaded_groups, hive_groups

VISION_GROUP = "vision_encoder"
"""The one group whose learning rate may fall from block to block."""


@dataclass
class OptimizerGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    """Module group, vision block where layer-wise decay splits it, and ``decay`` or ``no_decay``."""
    module_group: str
    lr: float
    """Peak learning rate."""
    weight_decay: float
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class StagePlan:
    """What a stage does to every parameter of a model."""

    stage: Stage
    module_groups: tuple[ModuleGroup, ...]
    group_of: dict[str, str]
    """Parameter name -> module group, for every parameter."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter, which ZeRO-3 hides later."""
    groups: list[OptimizerGroup]
    """What trains; never empty, none of them empty."""

    @property
    def trained_groups(self) -> set[str]:
        """Names of the module groups that train."""
        return {group.module_group for group in self.groups}


def groups_of(model: Any) -> tuple[ModuleGroup, ...]:
    """The parameter groups of a HIVE or a cascaded model."""
    if hasattr(model, "routes"):
        return hive_groups(model.routes.blocks_by_layer, model.last_vision_block)
    return cascaded_groups(model.last_vision_block)


def plan_stage(model: nn.Module, stage: Stage, module_groups: Sequence[ModuleGroup], config: StageConfig) -> StagePlan:
    """Set ``requires_grad`` on every parameter of ``model`` and return the optimizer groups.

    Raises:
        HiveError: a parameter without its one group, or nothing left to train.
    """
    group_of = assign_groups([name for name, _ in model.named_parameters()], module_groups)
    rates = {name: config.group_lr.get(name, config.lr) for name in stage.trains}
    peaks = {name: rate for name, rate in rates.items() if rate}  # a rate of 0 freezes a group
    num_blocks = max((_vision_block(name) for name, group in group_of.items() if group == VISION_GROUP), default=0)
    by_name: dict[str, OptimizerGroup] = {}
    for name, parameter in model.named_parameters():
        module_group = group_of[name]
        parameter.requires_grad_(module_group in peaks)
        if module_group not in peaks:
            continue
        group = _group_for(name, parameter, module_group, peaks[module_group], num_blocks, config)
        by_name.setdefault(group.name, group).parameters[name] = parameter
    if not by_name:
        raise HiveError(f"stage {stage.number} ({stage.name}): no parameter trains; its groups are {stage.trains}")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    groups = sorted(by_name.values(), key=lambda group: stage.trains.index(group.module_group))
    return StagePlan(stage, tuple(module_groups), group_of, shapes, groups)


def adamw(groups: Sequence[OptimizerGroup], stage: StageConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over ``groups``; ``fused`` for one kernel a step, on GPUs and CPUs."""
    return torch.optim.AdamW(
        [
            {
                "params": list(group.parameters.values()),
                "name": group.name,
                "lr": 0.0,  # set before every step; a step inside DeepSpeed's constructor must not decay weights
                "peak_lr": group.lr,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=stage.betas,
        eps=stage.eps,
        fused=fused,
    )


def _group_for(
    name: str, parameter: nn.Parameter, module_group: str, peak: float, num_blocks: int, config: StageConfig
) -> OptimizerGroup:
    """The (still empty) optimizer group that the parameter ``name`` belongs to."""
    decays = parameter.ndim > 1  # norms' weights and biases are vectors
    label = module_group
    if module_group == VISION_GROUP and config.vision_layer_decay != 1:
        block = _vision_block(name)
        label += f".block{block:02d}" if block else ".embeddings"
        peak *= config.vision_layer_decay ** (num_blocks - block)
    return OptimizerGroup(
        name=f"{label}/{'decay' if decays else 'no_decay'}",
        module_group=module_group,
        lr=peak,
        weight_decay=config.weight_decay if decays else 0.0,
    )


def _vision_block(name: str) -> int:
    """Block of a vision parameter, counted from 1; 0 for what comes before the blocks."""
    match = re.search(r"\.layers?\.(\d+)\.", name)
    return int(match[1]) + 1 if match else 0
