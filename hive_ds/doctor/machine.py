"""This machine: compilers, GPUs' driver, /dev/shm, disks, a free port."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from hive_ds.doctor.findings import Finding
from hive_ds.launch.hosts import DISK, SHM_ADVICE
from hive_ds.launch.preflight import gigabytes, try_to_write
from hive_ds.launch.preflight_verdict import CLOCK_SKEW
from hive_ds.launch.probe import SHM_PER_RANK, free, port_is_free

AREA = "machine"
CPU_RANKS = 2
"""Ranks that are reckoned with where there is no GPU."""
DRIVER = Path("/proc/driver/nvidia/version")
_TOOLS = {
    "g++": ("g++", "apt-get install g++; DeepSpeed and Triton compile with it at the first run"),
    "ninja": ("ninja", "apt-get install ninja-build, or pip install ninja; DeepSpeed builds its ops with it"),
}


def count_gpus() -> int:
    """NVIDIA devices that this machine shows, or those that CUDA_VISIBLE_DEVICES leaves of them."""
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return devices
    named = takewhile(lambda one: one and not one.startswith("-"), (one.strip() for one in visible.split(",")))
    return min(devices, len(list(named)))  # CUDA reads up to the first that is none


def check_machine(ranks: int, port: int | None) -> Iterator[Finding]:
    """Everything that needs no other process.

    Args:
        ranks: that are to run here.
        port: that rank 0 is to listen on; None: on another host.
    """
    yield _processor(ranks)
    yield _driver(count_gpus())
    for name, (program, advice) in _TOOLS.items():
        found = shutil.which(program)
        yield Finding(AREA, name, "ok", found) if found else Finding(AREA, name, "problem", "not on PATH", advice)
    yield shared_memory(free("/dev/shm"), ranks)
    yield _temporary(Path(tempfile.gettempdir()))
    if port is not None:
        yield _port(port)


def _processor(ranks: int) -> Finding:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = f"{cores} cores, {gigabytes(memory)} of memory"
    if cores < ranks:
        return Finding(AREA, "cores", "warning", f"{said}, for {ranks} ranks", "give the job at least a core a rank")
    return Finding(AREA, "cores", "ok", said)


def _driver(gpus: int) -> Finding:
    if not gpus:
        return Finding(AREA, "driver", "ok", "no NVIDIA device: training runs on the CPU, over gloo")
    if not DRIVER.is_file():
        advice = "load the driver (modprobe nvidia), or start the container with its GPUs (--gpus all)"
        return Finding(AREA, "driver", "problem", f"{gpus} devices, but no driver is loaded", advice)
    return Finding(AREA, "driver", "ok", DRIVER.read_text().splitlines()[0].removeprefix("NVRM version: "))


def shared_memory(available: int | None, ranks: int) -> Finding:
    """Whether /dev/shm, with so many bytes free, holds the batches of ``ranks`` ranks."""
    needed = ranks * SHM_PER_RANK
    said = f"{gigabytes(available)} free; {ranks} ranks need {gigabytes(needed)}"
    if available is None or available < needed:
        return Finding(AREA, "/dev/shm", "problem", said, SHM_ADVICE)
    return Finding(AREA, "/dev/shm", "ok", said)


def _temporary(folder: Path) -> Finding:
    space, fault = try_to_write(folder)
    if fault:
        return Finding(AREA, "temporary files", "problem", fault, "set TMPDIR to a folder of this node with room")
    return Finding(AREA, "temporary files", "ok", f"{folder}, {gigabytes(space)} free")


def _port(port: int) -> Finding:
    if port_is_free(port):
        return Finding(AREA, "port", "ok", f"{port} is free")
    advice = "choose another: --master_port of deepspeed, --port of hive-ds hosts run and of this command"
    return Finding(AREA, "port", "problem", f"{port} is in use", advice)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Whether runs can be written to ``folder``, and whether its file server has this machine's time."""
    area, name = "disk", str(folder)
    space, fault = try_to_write(folder)
    if fault or space is None:
        yield Finding(
            area, name, "problem", fault or "", "make room there, mend its permissions, or name another folder"
        )
        return
    if space < DISK:
        said = f"{gigabytes(space)} free; checkpoints of a large model want {gigabytes(DISK)} or more"
        yield Finding(area, name, "warning", said, "make room, or lower training.keep_checkpoints")
    else:
        yield Finding(area, name, "ok", f"{gigabytes(space)} free")
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        yield file_clock(Path(file.name).stat().st_mtime - time.time())


def file_clock(skew: float) -> Finding:
    """What to say of a file server whose clock is ``skew`` seconds ahead."""
    if abs(skew) <= CLOCK_SKEW:
        return Finding("disk", "clock of its server", "ok", f"{abs(skew):.1f} s off this machine's")
    advice = "start a time service (chrony, ntpd) on this machine and on the file server"
    return Finding("disk", "clock of its server", "warning", f"{skew:+.0f} s off this machine's", advice)
