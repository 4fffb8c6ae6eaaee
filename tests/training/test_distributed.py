"""How a process joins the others, and how it ends."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import atexit, gc

atexit.register(lambda: print(gc.get_freeze_count()))  # the first to be registered is the last to be called
from hive_ds.training.distributed import World, start

start(World())
assert gc.get_freeze_count() > 10**5
"""


def test_nothing_is_left_out_of_garbage_collection_when_python_ends() -> None:
    """Triton 3.9 would print some thirty lines of what it takes for leaked."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0"  # gloo of torch 2.9 prints before it
