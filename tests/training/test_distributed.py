"""How a process joins the others, and how it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from hive_ds.errors import HiveError
from hive_ds.training import distributed
from hive_ds.training.distributed import World

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


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "node1"}, {"MASTER_PORT": "1234"}])
def test_ranks_that_cannot_know_where_to_meet_say_so(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # `start` sets them
        monkeypatch.setenv(name, "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in given)
    with pytest.raises(HiveError, match=f"^2 ranks, but {missing} not set: where is rank 0"):
        distributed.start(World(0, 0, 2, 2))


def test_a_gpu_is_used_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, asked, used in ((True, "cpu", False), (True, "cuda", True), (True, "", True), (False, "cuda", False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setenv("DS_ACCELERATOR", asked)
        assert distributed.uses_gpu() == used


@pytest.mark.parametrize(("given", "ranks", "threads"), [(None, 4, [2]), (None, 16, [1]), ("3", 4, [])])
def test_ranks_share_out_the_cores_of_their_host(
    given: str | None, ranks: int, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    assert distributed._own_device(World(0, 0, 2 * ranks, ranks)) == torch.device("cpu")
    assert found == threads


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
