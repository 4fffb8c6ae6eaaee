"""Copies: to a device, which the host does not wait for, and of tensors that lie strewn in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; if it comes from the CPU, the host goes on at once.

    To a GPU it goes through pinned memory: what is copied from any other, beyond some 64 KiB, waits for all that the
    GPU was given before, and the host with it. PyTorch keeps the pinned memory until the copy is done.
    """
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def rows_in_memory(x: Tensor) -> Tensor:
    """``x`` with the values of its last axis side by side, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
