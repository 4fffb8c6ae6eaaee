"""How a process joins the others, and how it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

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


ENDING = """
import sys
from hive_ds.training.distributed import World
from hive_ds.training.faults import leave, report_crash, report_interrupt

print("not written yet")
if sys.argv[1] == "crash":
    report_crash(BrokenPipeError(32, "Broken pipe"), World(), "here")
    leave(1)
leave(report_interrupt(World()))
"""


@pytest.mark.parametrize(
    ("end", "errors", "code"),
    [
        ("Ctrl-C", subprocess.PIPE, 130),  # a terminal sends it to `| tee log` too
        ("Ctrl-C", subprocess.STDOUT, 130),
        ("crash", subprocess.STDOUT, 1),
    ],
)
def test_a_pipe_whose_reader_has_gone_is_no_other_error(end: str, errors: int, code: int) -> None:
    """A rank that raised here would not leave: Python waits for threads when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", ENDING, end]
    done = subprocess.run(command, stdout=writer, stderr=errors, text=True, env=environ)
    os.close(writer)
    assert done.returncode == code
    assert done.stderr is None or re.fullmatch("stopped by Ctrl-C: .*\n", done.stderr)
