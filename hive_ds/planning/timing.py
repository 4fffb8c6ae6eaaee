"""How long a step takes: a model of compute, memory and network whose every constant is a stated assumption.

``docs/planning.md`` has the formulas. No constant was fitted to a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, log2

from hive_ds.planning.communication import StepMessages
from hive_ds.planning.hardware import LINK_LATENCY, Gpu, Network
from hive_ds.planning.messages import ALL_REDUCE, Message

ADAM_BYTES = 30
"""Read and written per trained element in a step: gradient, weight and two moments in fp32, and the bf16 weight."""
CPU_ADAM_SECONDS = 1.4e-9
"""Per trained element and thread, one thread of a 2.8 GHz Xeon (ds_configs/README.md)."""
OFFLOAD_BYTES = 6
"""Per trained element over PCIe: an fp32 gradient down, a bf16 weight up."""


@dataclass(frozen=True)
class Assumptions:
    """What nobody has measured on the cluster in question."""

    efficiency: float = 0.4
    """Share of the peak FLOP/s that forward and backward reach."""
    bandwidth_share: float = 0.8
    """Share of the nominal bandwidth of links, networks and memory that is reached."""
    overlap: float = 0.7
    """Share of the shorter of compute and overlappable communication that hides behind the longer."""
    usable_memory: float = 0.9
    """Share of a GPU's memory before fragments, the CUDA context and NCCL's buffers take the rest."""
    threads: int = 8
    """CPU threads of a rank, where the optimizer runs there."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network: Network

    @property
    def ranks(self) -> int:
        """One a GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    """Forward and backward of all micro-batches."""
    hidden: float
    """Communication that may run beside compute."""
    exposed: float
    """Communication that may not: before and after the optimizer."""
    optimizer: float
    total: float
    """With what the overlap hides taken off."""

    @property
    def busy(self) -> float:
        """Share of the step in which forward and backward run."""
        return self.compute / self.total


def step_time(
    flops: float,
    messages: StepMessages,
    trained_here: float,
    cluster: Cluster,
    assumed: Assumptions,
    *,
    peak: float,
    overlaps: bool,
    offloads: bool,
) -> StepTime:
    """Time of a step.

    Args:
        flops: of one rank in the step, recomputation included.
        messages: of one rank in the step.
        trained_here: elements whose optimizer state this rank holds.
        cluster: where it runs.
        assumed: constants.
        peak: FLOP/s in the recipe's precision.
        overlaps: gradients are reduced while backward runs.
        offloads: the optimizer runs on the CPU.
    """
    compute = flops / (peak * assumed.efficiency)
    beside, alone = list(messages.gathers), [*messages.renewals, *messages.scalars]
    (beside if overlaps else alone).extend(messages.gradients)
    hidden, exposed = (communication_time(part, cluster, assumed) for part in (beside, alone))
    optimizer = _optimizer_time(trained_here, cluster.gpu, assumed, offloads=offloads)
    together = max(compute, hidden) + (1 - assumed.overlap) * min(compute, hidden)
    return StepTime(compute, hidden, exposed, optimizer, together + exposed + optimizer)


def communication_time(messages: Iterable[Message], cluster: Cluster, assumed: Assumptions) -> float:
    """Seconds of collectives one after the other, each as a ring over its ranks, node by node."""
    return sum(_ring_time(message, cluster, assumed) for message in messages)


def _ring_time(message: Message, cluster: Cluster, assumed: Assumptions) -> float:
    """Each byte that a rank sends crosses the link inside the node; per node it crosses the network once."""
    ranks = message.ranks
    if ranks == 1:
        return 0.0
    nodes = max(1, -(-ranks // cluster.gpus_per_node))
    inside = ranks - nodes
    slowest = cluster.gpu.link_bandwidth if inside else cluster.network.bandwidth
    if nodes > 1:
        slowest = min(slowest, cluster.network.bandwidth)
    latency = inside * LINK_LATENCY + (nodes if nodes > 1 else 0) * cluster.network.latency
    if message.kind == ALL_REDUCE:  # small ones go up and down a tree of nodes instead
        tree = (ranks // nodes - 1) * LINK_LATENCY + ceil(log2(nodes)) * cluster.network.latency
        latency = 2 * min(latency, tree)
    return latency + message.sent / (slowest * assumed.bandwidth_share)


def _optimizer_time(trained: float, gpu: Gpu, assumed: Assumptions, *, offloads: bool) -> float:
    if not offloads:
        return ADAM_BYTES * trained / (gpu.memory_bandwidth * assumed.bandwidth_share)
    copies = OFFLOAD_BYTES * trained / (gpu.host_bandwidth * assumed.bandwidth_share)
    return copies + CPU_ADAM_SECONDS * trained / assumed.threads
