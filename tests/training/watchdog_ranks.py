"""A rank that hangs, without a model: ``main([FAULT, FOLDER])``, with torchrun's variables.

Rank 0 has the fault, and keeps the store; the others wait for it in a collective.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch

from hive_ds.errors import HiveError
from hive_ds.training import distributed, faults, hang_report, watchdog
from hive_ds.training.distributed import barrier, read_world, start, stop
from hive_ds.training.place import here

TIMEOUT = 3.0


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def keeps_the_lock() -> None:
    """C code that does not let go of Python's lock."""
    ctypes.PyDLL(None).sleep(1000)


def cannot_write() -> None:
    """A disk that does not answer."""
    hang_report.Path.mkdir = lambda *_, **__: time.sleep(1000)  # type: ignore[assignment, method-assign]
    time.sleep(1000)


def was_stopped() -> None:
    """Stopped for longer than the timeout and let go on, with nothing to do meanwhile; the watchdog knew the phase."""
    time.sleep(TIMEOUT / 4)
    if not (child := os.fork()):
        time.sleep(1.5 * TIMEOUT)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(child, 0)
    time.sleep(TIMEOUT / 4)
    here.enter("end")


def lacks_a_gpu() -> None:
    """As on a host with a GPU less than ranks, while the other ranks have theirs: before the start."""
    distributed.uses_gpu, torch.cuda.device_count = lambda: True, lambda: 1
    faults._REPORT_WAIT = timedelta(seconds=1)


FAULTS = {fault.__name__: fault for fault in (is_stopped, keeps_the_lock, cannot_write, was_stopped, lacks_a_gpu)}


def main(arguments: list[str]) -> int:
    fault, folder = arguments
    watchdog.ANSWER_SECONDS, watchdog._PATIENCE = 2.0, 4.0
    world = read_world(os.environ)
    if fault == "lacks_a_gpu" and world.rank == 1:
        lacks_a_gpu()
    try:
        start(world)
    except HiveError as error:
        faults.report_error(error, world, debug=False)
        faults.leave(2)
    watchdog.watch(Path(folder), world, TIMEOUT)
    for step in (1, 2):
        here.begin_step(step)
        here.enter("data", ())
        if fault == "was_stopped" and step == 1:
            time.sleep(1.5 * TIMEOUT)  # longer, as the first step may take
        barrier()
    if world.rank == 0:
        FAULTS[fault]()
    barrier()
    watchdog.stop_watching()
    stop()
    print("over")
    return 0
