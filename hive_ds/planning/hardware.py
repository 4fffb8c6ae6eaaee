"""What GPUs and networks can do, from their makers' data sheets. None of it was measured here."""

from __future__ import annotations

from dataclasses import dataclass

from hive_ds.errors import require_one_of

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU, and what joins those of a node."""

    memory: float
    """Bytes."""
    bf16: float
    """FLOP/s of dense bf16 matrix products, the data sheet's peak."""
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second that a GPU sends to others of its node, one direction."""
    host_bandwidth: float
    """Bytes per second to CPU memory over PCIe, one direction."""
    fp32: float
    """FLOP/s of dense fp32 matrix products without TF32."""
    source: str


@dataclass(frozen=True)
class Network:
    """What joins nodes."""

    bandwidth: float
    """Bytes per second that a node sends, all its adapters together."""
    latency: float
    """Seconds of one hop."""
    source: str


_PCIE4, _PCIE5 = 32 * GB, 64 * GB

GPUS: dict[str, Gpu] = {
    "b200": Gpu(180 * GB, 2250e12, 7.7e12, 900 * GB, _PCIE5, 75e12, "NVIDIA HGX B200 data sheet"),
    "h200": Gpu(141 * GB, 989e12, 4.8e12, 450 * GB, _PCIE5, 67e12, "NVIDIA H200 data sheet, SXM, half the sparse"),
    "h100": Gpu(80 * GB, 989e12, 3.35e12, 450 * GB, _PCIE5, 67e12, "NVIDIA H100 data sheet, SXM, half the sparse"),
    "a100": Gpu(80 * GB, 312e12, 2.04e12, 300 * GB, _PCIE4, 19.5e12, "NVIDIA A100 data sheet, 80 GB SXM"),
    "a100-40gb": Gpu(40 * GB, 312e12, 1.56e12, 300 * GB, _PCIE4, 19.5e12, "NVIDIA A100 data sheet, 40 GB SXM"),
    "l40s": Gpu(48 * GB, 362e12, 0.864e12, _PCIE4, _PCIE4, 91.6e12, "NVIDIA L40S data sheet; no NVLink, PCIe 4.0 x16"),
    "rtx4090": Gpu(24 * GB, 165e12, 1.01e12, _PCIE4, _PCIE4, 82.6e12, "NVIDIA Ada white paper; fp32 sums, no NVLink"),
}  # fmt: skip

NETWORKS: dict[str, Network] = {
    "ib400x8": Network(400 * GB, 5e-6, "8 adapters of NDR InfiniBand, 400 Gbit/s each"),
    "ib200x8": Network(200 * GB, 5e-6, "8 adapters of HDR InfiniBand, 200 Gbit/s each"),
    "ib400": Network(50 * GB, 5e-6, "one adapter of NDR InfiniBand, 400 Gbit/s"),
    "ib200": Network(25 * GB, 5e-6, "one adapter of HDR InfiniBand, 200 Gbit/s"),
    "eth100": Network(12.5 * GB, 30e-6, "one adapter of Ethernet, 100 Gbit/s"),
    "eth25": Network(3.125 * GB, 30e-6, "one adapter of Ethernet, 25 Gbit/s"),
}
"""Bandwidths are the names of the standards; latencies are assumptions."""

LINK_LATENCY = 1e-6
"""Seconds of one hop inside a node: an assumption."""


def gpu_named(name: str) -> Gpu:
    """One of `GPUS`.

    Raises:
        HiveError: there is none of this name.
    """
    require_one_of("gpu", name, GPUS)
    return GPUS[name]


def network_named(name: str) -> Network:
    """One of `NETWORKS`.

    Raises:
        HiveError: there is none of this name.
    """
    require_one_of("network", name, NETWORKS)
    return NETWORKS[name]
