"""Bytes that weights, gradients and optimizer state take on each rank under a ZeRO policy, in closed form.

N parameters, T of them trained, R ranks. As DeepSpeed 0.19.8 allocates them (`ds_configs/README.md`): a weight in the
recipe's precision, an fp32 copy and Adam's two moments of what trains, gradients summed in ``grad_accum_dtype``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hive_ds.training.ds_config import zero_section
from hive_ds.training.groups import StagePlan

_ADAM = 8
"""Two fp32 moments."""
_FP32 = 4


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank for as long as training runs."""

    parameters: int
    """Weights in the recipe's precision: this rank's part, or all."""
    gradients: int
    """What holds the sum of gradients until the optimizer steps."""
    optimizer: int
    """fp32 weights and Adam's moments."""
    host: int
    """All that lies in CPU memory instead."""

    @property
    def by_category(self) -> dict[str, int]:
        """What lies on the GPU."""
        return {"parameters": self.parameters, "gradients": self.gradients, "optimizer": self.optimizer}

    @property
    def device(self) -> int:
        """On the GPU, in sum."""
        return sum(self.by_category.values())


def model_state_bytes(
    plan: StagePlan, policy: Mapping[str, Any], *, ranks: int, precision: str, hpz: int = 1
) -> ModelStates:
    """Model states of one rank.

    Args:
        plan: of the stage; its shapes and groups are read, so its parameters may be on the meta device.
        policy: a DeepSpeed config, or a policy of ``ds_configs/``.
        ranks: of the run.
        precision: ``bf16`` or ``fp32``.
        hpz: ranks that share the second copy of the weights; 1: there is none.
    """
    zero, weight = zero_section(policy), weight_bytes(precision)
    stage = zero["stage"]
    sizes = {name: math.prod(shape) for name, shape in plan.shapes.items()}
    trained = [sizes[name] for group in plan.groups for name in group.parameters]
    elements = sum(sizes.values())
    if stage == 3:
        elements = _split(sizes.values(), ranks) + _persistent(sizes.values(), zero, ranks)
        elements += _split(sizes.values(), hpz) if hpz > 1 else 0
    summed = _FP32 if policy.get("data_types", {}).get("grad_accum_dtype") == "fp32" else weight
    part = _split(trained, ranks)
    gradients = {0: _FP32 * sum(trained), 1: weight * sum(trained)}.get(stage, summed * part)
    copy = 0 if stage == 0 and precision == "fp32" else _FP32
    optimizer = (_ADAM + copy) * (sum(trained) if stage == 0 else part)
    return _offloaded(ModelStates(weight * elements, gradients, optimizer, 0), zero, part)


def zero_buffer_bytes(plan: StagePlan, policy: Mapping[str, Any], *, precision: str) -> int:
    """What ZeRO works in, at most: the buckets that gradients go through, and ZeRO 3's gathered weights."""
    zero, weight = zero_section(policy), weight_bytes(precision)
    stage = zero["stage"]
    # ZeRO 2 fills one while another is on its way.
    buckets = {0: 0, 1: 1, 2: 2 if zero.get("overlap_comm") else 1, 3: 1}[stage]
    bucket = buckets * weight * int(zero["reduce_bucket_size"])
    total = sum(math.prod(shape) for shape in plan.shapes.values())
    return bucket + (weight * min(int(zero["stage3_max_live_parameters"]), total) if stage == 3 else 0)


def weight_bytes(precision: str) -> int:
    """Bytes of one weight."""
    return 2 if precision == "bf16" else 4


def _split(sizes: Iterable[int], ranks: int) -> int:
    """Elements of one rank when each parameter is shared out evenly, the last part padded."""
    return sum(-(-size // ranks) for size in sizes)


def _persistent(sizes: Iterable[int], zero: Mapping[str, Any], ranks: int) -> int:
    """Elements of small parameters that every rank holds whole beside its part."""
    threshold = zero["stage3_param_persistence_threshold"]
    return sum(size for size in sizes if size <= threshold) if ranks > 1 else 0


def _offloaded(states: ModelStates, zero: Mapping[str, Any], part: int) -> ModelStates:
    """``states`` with what the policy moves to the host there; a pinned fp32 gradient comes on top."""
    if zero.get("offload_optimizer", {}).get("device", "none") == "none":
        return states
    host = states.gradients + states.optimizer + _FP32 * part
    if zero.get("offload_param", {}).get("device", "none") == "none":
        return ModelStates(states.parameters, 0, 0, host)
    return ModelStates(0, 0, 0, host + states.parameters)
