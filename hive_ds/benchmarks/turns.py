"""Processes that share a GPU and must not be timed at the same time."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LOCK = Path(tempfile.gettempdir()) / "hive-ds-gpu.lock"


@contextmanager
def turn_on_gpu(device: torch.device) -> Iterator[None]:
    """Wait until no other process of this machine is being timed; a killed one lets go by itself. Nothing on CPUs."""
    if device.type != "cuda":
        yield
        return
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
