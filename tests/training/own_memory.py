"""How much memory a piece of code needs in this process."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def most_memory() -> Iterator[list[float]]:
    """The most MiB of its own that this process holds meanwhile, beyond what it held before.

    Pages of files that are only mapped do not count; what was freed before is given back first.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, most, done = own_memory(), [0.0], threading.Event()

    def look() -> None:
        while not done.is_set():
            most[0] = max(most[0], own_memory() - before)
            time.sleep(0.005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def own_memory() -> float:
    """MiB in the pages of this process that no other shares."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) / 1024
