"""Ranks: who am I, how many are we, and the process group, under any launcher.

Launchers disagree on environment variables. `read_world` understands torchrun and the ``deepspeed`` launcher
(RANK, LOCAL_RANK), srun and ``deepspeed --launcher slurm`` (SLURM_PROCID, ...) and mpirun (OMPI_*); `start` writes the
answer back under torchrun's names, LOCAL_WORLD_SIZE among them, which mosaicml-streaming needs and the ``deepspeed``
launcher does not set.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import socket
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from hive_ds.errors import HiveError
from hive_ds.launch.meeting import late_is_said, set_meeting_point
from hive_ds.launch.network import choose_interface

TIMEOUT = timedelta(minutes=30)
"""How long a collective may wait: the slowest thing between two is rank 0 writing a model."""

_store: list[dist.Store] = []
"""The process group's key-value store, once there is one."""

_LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    # Not SLURM_NTASKS: that one also stands in the shell of an interactive job, where a single process runs.
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", ("SLURM_STEP_TASKS_PER_NODE",)),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
)


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    """Processes on this host."""

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes."""
        return self.rank == 0


def read_world(env: Mapping[str, str]) -> World:
    """Read this process's place from the variables of whichever launcher started it; one process if none did.

    Raises:
        HiveError: a variable is missing, is no number, or the numbers contradict one another.
    """
    for rank, local_rank, size, local_sizes in _LAUNCHERS:
        if rank not in env or size not in env:
            continue
        known = next((name for name in local_sizes if name in env), None)
        size_value = _number(env, size)
        world = World(
            rank=_number(env, rank),
            local_rank=_number(env, local_rank),
            size=size_value,
            local_size=_on_this_host(env, known) if known else _single_host_size(env, size, size_value, local_sizes),
        )
        if not (0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size <= world.size):
            raise HiveError(
                f"launcher variables contradict one another: {rank}={world.rank}, {local_rank}={world.local_rank}, "
                f"{size}={world.size}, ranks on this host {world.local_size}"
            )
        return world
    return World()


def uses_gpu() -> bool:
    """Whether ranks run on GPUs: where there are any, unless DS_ACCELERATOR=cpu says otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device_name(device: torch.device) -> str:
    """What the GPU is called, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def start(world: World, timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the process group (gloo on CPUs, nccl on GPUs) and return this rank's device.

    What exists by then is left out of garbage collection from here on: DeepSpeed runs full collections whenever it
    gathers weights to save them, and while one rank collects, all wait.

    Args:
        world: this process among all.
        timeout: how long a collective may wait.

    Raises:
        HiveError: several ranks and no MASTER_ADDR and MASTER_PORT, or more ranks on this host than GPUs.
    """
    if "RANK" not in os.environ:  # no launcher but Slurm itself
        set_meeting_point(os.environ)
    for name, value in (
        ("RANK", world.rank),
        ("LOCAL_RANK", world.local_rank),
        ("WORLD_SIZE", world.size),
        ("LOCAL_WORLD_SIZE", world.local_size),
    ):
        os.environ[name] = str(value)
    gc.freeze()
    atexit.register(gc.unfreeze)  # Triton 3.9 reports what is still frozen when Python ends as leaked, line by line
    # DeepSpeed calls functions that torch 2.14 deprecates, and whose replacements torch 2.9 does not have.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    _check_meeting_point(world)
    with _late_is_said(world):
        _store.append(_join(world))
        device = _own_device(world)
        if device.type == "cpu":  # AdamW looks for GPUs in every step, which else reads the driver's library anew
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Groups that DeepSpeed makes take torch's defaults: 10 minutes under NCCL.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store[-1],
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    return device


def current_store() -> dist.Store | None:
    """The process group's key-value store, once this rank has met the others."""
    return _store[-1] if _store else None


def _check_meeting_point(world: World) -> None:
    if world.size == 1:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise HiveError(f"{world.size} ranks, but {' and '.join(missing)} not set: where is rank 0?")
    if not 0 < _number(os.environ, "MASTER_PORT") < 1 << 16:
        raise HiveError(f"launcher variable MASTER_PORT is {os.environ['MASTER_PORT']!r}; expected 1 to 65535")


def _late_is_said(world: World) -> AbstractContextManager[None]:
    if world.size == 1:
        return nullcontext()
    who, others = f"rank {world.rank} on {socket.gethostname()}", f"all {world.size} ranks" if world.is_main else ""
    return late_is_said(who, os.environ["MASTER_ADDR"], _number(os.environ, "MASTER_PORT"), waited_for=others)


def _join(world: World) -> dist.Store:
    """Meet the other ranks."""
    if world.size == 1:
        return dist.HashStore()
    if world.local_size < world.size:
        choose_interface(os.environ, os.environ["MASTER_ADDR"])
    joined, _, _ = next(dist.rendezvous("env://", world.rank, world.size))
    return joined


def _own_device(world: World) -> torch.device:
    if not uses_gpu():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if world.local_rank >= gpus:
        raise HiveError(
            f"{world.local_size} ranks on {socket.gethostname()}, but rank {world.rank} sees {gpus} GPUs: "
            "start one rank a GPU, and let each see all GPUs of its node (srun --gpu-bind=none, not --gpus-per-task)"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _store.clear()


def sum_over_ranks(values: Sequence[float] | Tensor, device: torch.device) -> list[float]:
    """Add up a vector over all ranks, in float64."""
    return _reduce(values, device, dist.ReduceOp.SUM)


def min_over_ranks(values: Sequence[float] | Tensor, device: torch.device) -> list[float]:
    """Element-wise minimum of a vector over all ranks, in float64."""
    return _reduce(values, device, dist.ReduceOp.MIN)


def from_main(value: Any) -> Any:
    """Rank 0's ``value``, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_values(value: Any) -> list[Any]:
    """Every rank's ``value``, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()


def _reduce(values: Sequence[float] | Tensor, device: torch.device, op: Any) -> list[float]:
    vector = torch.as_tensor(values, dtype=torch.float64).to(device)
    dist.all_reduce(vector, op=op)
    return vector.tolist()


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not value.isdecimal():
        raise HiveError(f"launcher variable {name} is {value!r}; expected a number")
    return int(value)


def _on_this_host(env: Mapping[str, str], name: str) -> int:
    """Ranks on this host; Slurm writes ``2(x3),1`` for three nodes of two tasks and a fourth of one."""
    if not name.startswith("SLURM_"):
        return _number(env, name)
    counts: list[int] = []
    for part in env[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise HiveError(f"launcher variable {name} is {env[name]!r}; expected counts like 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID")
    if node >= len(counts):
        raise HiveError(f"SLURM_NODEID is {node}, but {name} = {env[name]!r} lists {len(counts)} nodes")
    return counts[node]


def _single_host_size(env: Mapping[str, str], size_name: str, size: int, local_sizes: Sequence[str]) -> int:
    if size == 1:
        return 1
    raise HiveError(f"{size_name}={size}, but none of {', '.join(local_sizes)} says how many ranks run on this host")
