"""How much of a device's memory a rank takes, and took at its peak: on a GPU by PyTorch, on a CPU by the kernel."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

import torch

from hive_ds.errors import HiveError

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"
"""Written to ``clear_refs``: the peak is what is there now (proc(5))."""


class DeviceMemory(Protocol):
    """Bytes of one device, as the rank on it sees them."""

    name: str
    total: int
    """What this rank may fill."""

    def used(self) -> int:
        """Held now, by whoever holds it."""

    def peak(self) -> int:
        """Most that was held since `forget_peak`."""

    def forget_peak(self) -> None:
        """Begin again with what is held now."""


def device_memory(device: torch.device, ranks_here: int) -> DeviceMemory:
    """The memory of ``device``; on a CPU the machine's, shared out evenly among the ``ranks_here`` of this host."""
    return GpuMemory(device) if device.type == "cuda" else HostMemory(ranks_here)


class GpuMemory:
    """A GPU's: tensors of this process, and all that is not PyTorch's (CUDA itself, NCCL, other processes)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = torch.cuda.get_device_name(device)
        self.total = torch.cuda.mem_get_info(device)[1]

    def used(self) -> int:
        """Tensors now, and what others hold."""
        return self._outside() + torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """Tensors at their peak, and what others hold now."""
        return self._outside() + torch.cuda.max_memory_allocated(self._device)

    def forget_peak(self) -> None:
        """Reset PyTorch's statistics."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def _outside(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)


class HostMemory:
    """A machine's: the resident memory of this process, which also holds what malloc has not given back."""

    def __init__(self, ranks_here: int) -> None:
        self.name = "cpu"
        self.total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_here

    def used(self) -> int:
        """Resident now."""
        return _resident("VmRSS")

    def peak(self) -> int:
        """Resident at the peak."""
        return _resident("VmHWM")

    def forget_peak(self) -> None:
        """Have the kernel begin again; HiveError where it does not."""
        try:
            (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        except OSError as error:
            raise _unknown(error) from error


def _resident(name: str) -> int:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    except OSError as error:
        raise _unknown(error) from error
    if found is None:
        raise _unknown(f"{_PROCESS / 'status'} has no {name}")
    return int(found[1]) * 1024


def _unknown(reason: object) -> HiveError:
    return HiveError(f"micro_batch_size auto: the memory of a process cannot be read ({reason}); expected a number")
