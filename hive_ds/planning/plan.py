"""Which ZeRO profile a stage runs under on a cluster, whether it fits, and how long it takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hive_ds.errors import HiveError
from hive_ds.planning.communication import StepMessages, ZeroPolicy
from hive_ds.planning.messages import bytes_sent
from hive_ds.planning.stage_model import StageModel
from hive_ds.planning.timing import Assumptions, Cluster, StepTime, step_time
from hive_ds.training.ds_config import read_policy
from hive_ds.training.global_batch import micro_batches

PROFILES = ("zero0", "zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload_optimizer", "zero3_offload_param")
"""Files of ``ds_configs/``, in the order in which they are preferred where they take equally long."""
GPU_COUNTS = tuple(2**power for power in range(11))
"""1 to 1,024."""


@dataclass(frozen=True)
class ProfilePlan:
    """A stage under one profile on one cluster."""

    profile: str
    ranks: int
    micro_batch: int
    accumulation: int
    memory: dict[str, float]
    """Bytes on a GPU at the peak, by category."""
    usable: float
    """Bytes of a GPU that may be filled."""
    host_memory: float
    """Bytes of CPU memory a rank, where the profile offloads."""
    messages: StepMessages
    time: StepTime

    @property
    def fits(self) -> bool:
        """Into the GPU."""
        return self.peak <= self.usable

    @property
    def peak(self) -> float:
        """Bytes on a GPU."""
        return sum(self.memory.values())

    @cached_property
    def sent(self) -> float:
        """Bytes that a rank sends in a step."""
        return bytes_sent(self.messages.all)

    @property
    def samples_per_second(self) -> float:
        """Over all ranks."""
        return self.ranks * self.micro_batch * self.accumulation / self.time.total


def plan_profile(model: StageModel, profile: str, cluster: Cluster, assumed: Assumptions) -> ProfilePlan:
    """Plan a stage with the largest micro-batch, up to the recipe's, that fits; or the smallest, where none does.

    Raises:
        HiveError: the ranks do not divide the global batch.
    """
    ranks = cluster.ranks
    share = model.config.global_batch_size // ranks
    sizes = micro_batches(model.config, ranks)[::-1]
    policy = read_policy(profile)
    zero = ZeroPolicy.of(policy, ranks, cluster.gpus_per_node)
    states = model.states(policy, ranks, zero.ranks_per_copy)
    usable = cluster.gpu.memory * assumed.usable_memory
    peaks = {size: model.memory(states, policy, size) for size in sizes}
    micro = next((size for size in sizes if sum(peaks[size].values()) <= usable), 1)
    messages = model.messages(zero, ranks, share // micro)
    time = step_time(
        model.flops_per_sample * share,
        messages,
        model.trained / ranks if zero.stage else model.trained,
        cluster,
        assumed,
        peak=cluster.gpu.bf16 if model.precision == "bf16" else cluster.gpu.fp32,
        overlaps=bool(policy["zero_optimization"].get("overlap_comm")),
        offloads=zero.offloads_optimizer,
    )
    return ProfilePlan(profile, ranks, micro, share // micro, peaks[micro], usable, states.host, messages, time)


def plan_profiles(model: StageModel, cluster: Cluster, assumed: Assumptions) -> list[ProfilePlan]:
    """Every profile; zero3_hpz only where there are several nodes, for it is zero3 elsewhere."""
    names = [name for name in PROFILES if cluster.nodes > 1 or name != "zero3_hpz"]
    return [plan_profile(model, name, cluster, assumed) for name in names]


def best_of(plans: Sequence[ProfilePlan]) -> ProfilePlan | None:
    """The fastest of those that fit; None if none does."""
    return min((plan for plan in plans if plan.fits), key=lambda plan: plan.time.total, default=None)


def scaling(model: StageModel, cluster: Cluster, assumed: Assumptions) -> dict[str, list[ProfilePlan]]:
    """The plans of every profile on `GPU_COUNTS`, the recipe's global batch shared out among them.

    Numbers of GPUs that do not divide the global batch are left out.
    """
    curves: dict[str, list[ProfilePlan]] = {name: [] for name in PROFILES}
    for count in GPU_COUNTS:
        whole = count <= cluster.gpus_per_node or count % cluster.gpus_per_node == 0
        if model.config.global_batch_size % count or not whole:
            continue
        per_node = min(count, cluster.gpus_per_node)
        grown = replace(cluster, nodes=count // per_node, gpus_per_node=per_node)
        for plan in plan_profiles(model, grown, assumed):
            curves[plan.profile].append(plan)
    return {name: plans for name, plans in curves.items() if plans}


def steps_of(model: StageModel, samples: int | None) -> int | None:
    """Optimizer steps of the stage; None where they depend on a number of samples that nobody gave."""
    if model.config.steps is not None:
        return model.config.steps
    if samples is None:
        return None
    epoch = math.ceil(samples / model.config.global_batch_size)  # the last batch of an epoch is filled up
    return max(1, round(model.config.epochs * epoch))


def count_samples(train: str | Mapping[str, float]) -> int | None:
    """Samples in local MDS folders, by their index files; None where one is not there.

    Raises:
        HiveError: an index file is not readable.
    """
    total = 0
    for folder in [train] if isinstance(train, str) else train:
        index = Path(folder) / "index.json"
        if not index.is_file():
            return None
        try:
            total += sum(int(shard["samples"]) for shard in json.loads(index.read_text())["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise HiveError(f"{index}: expected the index of an MDS folder ({error!r})") from error
    return total


def as_json(plan: ProfilePlan) -> dict[str, Any]:
    """A plan's numbers."""
    return {
        "profile": plan.profile,
        "gpus": plan.ranks,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "fits": plan.fits,
        "memory_bytes": {**plan.memory, "peak": plan.peak, "usable": plan.usable, "host": plan.host_memory},
        "sent_bytes": plan.sent,
        "messages": len(plan.messages.all),
        "seconds": {**vars(plan.time)},
        "samples_per_second": plan.samples_per_second,
    }
