"""Every collective of an optimizer step, by ZeRO policy: DeepSpeed's (0.19.8) and the training loop's own.

Left out: validation, checkpoints, log lines, and the first steps of a run, in which ZeRO-3 learns the order of modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

from torch import nn

from hive_ds.planning.gathers import DIFFERENT, Gather, Gatherer, GatherLimits
from hive_ds.planning.messages import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Message
from hive_ds.planning.trace import FETCH, Trace, parameters_read
from hive_ds.training.ds_config import zero_section
from hive_ds.training.gather_units import layer_units, whole_limit
from hive_ds.training.groups import StagePlan
from hive_ds.training.metrics import Totals

FLOAT32, FLOAT64 = 4, 8
_BUCKET = 500_000_000
"""Elements of the buffer that ZeRO 0 reduces gradients through; no key sets it."""


@dataclass(frozen=True, eq=False)
class ParameterLayout:
    """What DeepSpeed sees of a model in a stage."""

    sizes: dict[str, int]
    """Elements by parameter, in the model's order; a tied weight stands once."""
    groups: tuple[tuple[str, ...], ...]
    """Names of the parameters of each optimizer group."""
    module_groups: int
    """Groups whose gradient norm is logged."""
    owned: dict[str, tuple[str, ...]]
    """Parameters that a module reads itself, by module."""
    units: tuple[str, ...]
    """Modules that ZeRO-3 gathers as one (`hive_ds.training.gather_units`), unless the model is one."""

    @classmethod
    def of(cls, model: nn.Module, plan: StagePlan) -> ParameterLayout:
        """Of a model on any device, the meta device too."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        units = {id(unit) for unit in layer_units(model)}
        owned = {
            path: tuple(dict.fromkeys(names[id(parameter)] for parameter in parameters_read(module)))
            for path, module in model.named_modules()
        }
        return cls(
            sizes={name: parameter.numel() for name, parameter in model.named_parameters()},
            groups=tuple(tuple(group.parameters) for group in plan.groups),
            module_groups=len(plan.trained_groups),
            owned=owned,
            units=tuple(path for path, module in model.named_modules() if id(module) in units),
        )

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that train."""
        return frozenset(name for group in self.groups for name in group)


@dataclass(frozen=True)
class ZeroPolicy:
    """What a file of ``ds_configs/`` says about communication, with DeepSpeed's defaults filled in."""

    stage: int
    reduce_bucket: int
    limits: GatherLimits
    whole_limit: int
    ranks_per_copy: int
    """Ranks that hold one copy of the weights between them (hpZ); 1 without hpZ."""
    offloads_optimizer: bool

    @classmethod
    def of(cls, policy: Mapping[str, Any], num_ranks: int, ranks_per_node: int) -> ZeroPolicy:
        """Of `hive_ds.training.ds_config.read_policy`."""
        zero = zero_section(policy)
        copy = zero.get("zero_hpz_partition_size", 1)
        if copy == "auto":
            copy = ranks_per_node if ranks_per_node < num_ranks else 1
        return cls(
            stage=zero["stage"],
            reduce_bucket=int(zero["reduce_bucket_size"]),
            limits=GatherLimits(
                persistence_threshold=int(zero["stage3_param_persistence_threshold"]),
                prefetch_bucket=int(zero["stage3_prefetch_bucket_size"]),
                reuse_distance=int(zero["stage3_max_reuse_distance"]),
                live_parameters=int(zero["stage3_max_live_parameters"]),
            ),
            whole_limit=whole_limit(policy),
            ranks_per_copy=copy,
            offloads_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        )


@dataclass(frozen=True)
class StepMessages:
    """Collectives of one rank in one optimizer step, by what they carry."""

    gathers: list[Message]
    """Of weights, in forward and backward (ZeRO-3)."""
    renewals: list[Message]
    """Of weights that every rank keeps whole, after the optimizer (ZeRO 1 and 2, and ZeRO-3 of a model kept whole)."""
    gradients: list[Message]
    scalars: list[Message]
    """Losses, token counts, norms, agreements: a few numbers each."""

    @property
    def all(self) -> list[Message]:
        """Every one."""
        return [*self.gathers, *self.renewals, *self.gradients, *self.scalars]


def step_messages(
    layout: ParameterLayout,
    trace: Trace,
    policy: ZeroPolicy,
    *,
    num_ranks: int,
    micro_batches: int,
    weight_bytes: int,
) -> StepMessages:
    """Predict a step in the steady state.

    Args:
        layout: of the model and stage.
        trace: of a micro-batch.
        policy: of the run.
        num_ranks: of the run.
        micro_batches: of one rank in one optimizer step.
        weight_bytes: of an element, 2 for bf16; gradients travel in the same type.
    """
    step = _Step(layout, trace, policy, num_ranks, micro_batches, weight_bytes)
    return StepMessages(step.gathers(), step.renewals(), step.gradients(), step.scalars())


@dataclass(frozen=True)
class _Step:
    """The arguments of `step_messages`, and the messages by what they carry."""

    layout: ParameterLayout
    trace: Trace
    policy: ZeroPolicy
    num_ranks: int
    micro_batches: int
    weight_bytes: int

    def gathers(self) -> list[Message]:
        """ZeRO-3's, in forward and backward; one rank by itself gathers nothing."""
        if self.policy.stage < 3 or self.num_ranks == 1 or self._is_whole:
            return []
        second_copy = self.policy.ranks_per_copy > 1
        parts = _gathers(self.layout, self.trace, self.policy.limits, second_copy, min(self.micro_batches, DIFFERENT))
        alike = [parts[-1]] * (self.micro_batches - len(parts))
        return [self._gather(gather) for part in [*parts, *alike] for gather in part]

    def _gather(self, gather: Gather) -> Message:
        elements = sum(self._padded(self.layout.sizes[name]) for name in gather.parameters)
        ranks = self.policy.ranks_per_copy if gather.within_node else self.num_ranks
        return Message(ALL_GATHER, elements * self.weight_bytes, ranks)

    def renewals(self) -> list[Message]:
        """Of each optimizer group, aligned to 2 elements a rank; under ZeRO-3 of a model kept whole, all at once."""
        if self.num_ranks == 1:
            return []
        if self.policy.stage == 3 and self._is_whole:
            size = sum(self._padded(self.layout.sizes[name]) for name in self.layout.trained)
            return [self._message(ALL_GATHER, size * self.weight_bytes)]
        if self.policy.stage not in (1, 2):
            return []
        unit = 2 * self.num_ranks
        sums = (sum(self.layout.sizes[name] for name in group) for group in self.layout.groups)
        sizes = [ceil(size / unit) * unit for size in sums]
        return [self._message(ALL_GATHER, size * self.weight_bytes) for size in sizes]

    def gradients(self) -> list[Message]:
        """Each micro-batch reduces them under ZeRO 2 and 3, the whole step under ZeRO 0 and 1."""
        names = [name for name in self.layout.sizes if name in self.layout.trained]
        if self.policy.stage == 0:  # the engine fills a fixed buffer in the model's order, and past its end
            buckets = _filled((self.layout.sizes[name] for name in names), _BUCKET, past_the_end=True)
            return [self._message(ALL_REDUCE, bucket * self.weight_bytes) for bucket in buckets]
        kind = REDUCE_SCATTER if self.policy.stage == 3 else ALL_REDUCE
        backward = (event.module for event in self.trace.events if event.kind == FETCH and not event.forward)
        order = dict.fromkeys(name for module in backward for name in self.layout.owned[module])
        sizes = [self.layout.sizes[name] for name in order if name in self.layout.trained]
        buckets = _filled(sizes, self.policy.reduce_bucket, past_the_end=False)
        if self.policy.stage == 3:
            padding = sum(self._padded(size) - size for size in sizes)
            buckets[-1] += padding
        times = 1 if self.policy.stage == 1 else self.micro_batches
        return [self._message(kind, bucket * self.weight_bytes) for bucket in buckets] * times

    def scalars(self) -> list[Message]:
        """The loop's one: loss, norms, totals, agreement to stop; and what DeepSpeed asks besides."""
        sizes = [FLOAT64 * (1 + self.layout.module_groups + len(Totals().vector()) + 2)]
        if self.policy.stage in (1, 2) and self.weight_bytes == 2:
            sizes.append(1)  # did anything overflow
        elif self.policy.stage == 0 and self.weight_bytes == 4:
            sizes.append(FLOAT32)  # its norm
        return [self._message(ALL_REDUCE, size) for size in sizes]

    @property
    def _is_whole(self) -> bool:
        """Whether ZeRO-3 keeps the model whole (`hive_ds.training.gather_units.WholeModel`)."""
        return sum(self.layout.sizes.values()) <= self.policy.whole_limit

    def _padded(self, elements: int) -> int:
        return ceil(elements / self.num_ranks) * self.num_ranks

    def _message(self, kind: str, size: int) -> Message:
        return Message(kind, size, self.num_ranks)


@lru_cache(maxsize=32)
def _gathers(
    layout: ParameterLayout, trace: Trace, limits: GatherLimits, second_copy: bool, micro_batches: int
) -> list[list[Gather]]:
    """Of the second of two steps: what one leaves, the next finds. They do not depend on the number of ranks."""
    units = frozenset(layout.units)
    hooked = [name for name in layout.owned if not any(_is_inside(name, unit) for unit in units)]
    owned = {name: (*layout.owned[name], *trace.foreign.get(name, ())) for name in layout.owned}
    inside = {
        name: tuple(
            dict.fromkeys(one for other in owned if other == name or _is_inside(other, name) for one in owned[other])
        )
        for name in hooked
    }
    events = [event for event in trace.events if event.module in inside]
    gatherer = Gatherer(layout.sizes, layout.trained, owned, inside, units, events, limits, second_copy=second_copy)
    gatherer.run_step(micro_batches)
    return gatherer.run_step(micro_batches)


def _is_inside(module: str, other: str) -> bool:
    return module != other and (other == "" or module.startswith(f"{other}."))


def _filled(sizes: Iterable[int], capacity: int, *, past_the_end: bool) -> list[int]:
    """Elements of each bucket; with ``past_the_end`` the one that overflows a bucket is its last."""
    buckets: list[int] = []
    current = 0
    for size in sizes:
        if not past_the_end and current and current + size > capacity:
            buckets.append(current)
            current = 0
        current += size
        if past_the_end and current > capacity:
            buckets.append(current)
            current = 0
    return [*buckets, current] if current else buckets
