"""What is asked of the device between timings; on a CPU there is nothing to wait for and nothing to free."""

from __future__ import annotations

import gc

import torch


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def held_by_others(device: torch.device) -> int:
    """Bytes of a GPU that PyTorch has not in this process: those of waiting ways, and of CUDA itself."""
    if device.type != "cuda":
        return 0
    free_bytes, total = torch.cuda.mem_get_info(device)
    return total - free_bytes - torch.cuda.memory_reserved(device)
