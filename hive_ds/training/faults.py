"""How a rank ends that cannot go on: one message for all ranks, and at once."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from hive_ds.constants import EXIT_STOPPED
from hive_ds.errors import INTERRUPTED, HiveError
from hive_ds.training.distributed import World, current_store
from hive_ds.training.place import here

_HINTS = (
    ("DataLoader worker", "the kernel kills processes where memory is short; lower data.num_workers"),
    ("EADDRINUSE", "another program of this host has the port; give the launcher another: --master_port N"),
    ("out of memory", "lower micro_batch_size or let auto find it, or set model.gradient_checkpointing"),
)
"""What errors of others leave unsaid, by a part of their text."""
_REPORTED = "hive_ds/error_reported"
_REPORTS = "hive_ds/reports"
_REPORT_WAIT = timedelta(seconds=10)


def report_error(error: HiveError, world: World, *, debug: bool) -> None:
    """Print an error once: by rank 0 if it has it too, else by the rank that has it.

    An error on one rank alone leaves the others waiting for it; the launcher ends them when this rank exits.
    """
    if not world.is_main and _main_reports(world):
        return
    _claim_report()
    trace = _trace(error) if debug else ""
    rank = "" if world.is_main else f" (rank {world.rank})"
    _say(f"{trace}{_new_line()}error{rank}: {error}")
    store = current_store()
    if world.is_main and store is not None:
        store.set(_REPORTED, "1")


def report_crash(error: Exception, world: World, where: str) -> None:
    """Print what went wrong: stack trace and one line. Only the first rank does; the others lost it and fail too.

    Args:
        error: what was raised.
        world: this process among all.
        where: what the rank was doing.
    """
    if not _claim_report():
        return
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    hints = "".join(f" ({hint})" for part, hint in _HINTS if part in reason)
    line = f"error: rank {world.rank} on {socket.gethostname()}: {reason}{hints}; at {where}"
    _say(f"{_new_line()}{_trace(error)}{line}")


def report_interrupt(world: World) -> int:
    """Say once what Ctrl-C leaves; returns the exit code."""
    if world.is_main:
        line = "stopped by Ctrl-C: the same command goes on from the newest checkpoint, if there is one"
        _say(f"{_new_line()}{line} (a file STOP in the stage's folder stops a run without losing a step)")
    return INTERRUPTED


def _say(text: str) -> None:
    """On stderr; to nobody where that is a pipe whose reader has gone, as ``| tee`` has that had the same Ctrl-C."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _new_line() -> str:
    """Ends the line of the progress bar, so that those who search logs find errors at the start of one."""
    return "\n" if here.steps_begun else ""


def _claim_report() -> bool:
    """Whether this rank is the first to report anything."""
    store = current_store()
    try:
        return store is None or store.add(_REPORTS, 1) == 1
    except RuntimeError:  # the store went with rank 0, which had reported
        return False


def _main_reports(world: World) -> bool:
    """Whether rank 0 reports the error of this rank.

    Before the ranks have met, all read the same input: rank 0 says what is wrong and ends, and the launcher then ends
    this rank. Were it the first to end, a busy rank 0 would be ended before it said a word.
    """
    store = current_store()
    if store is None:
        time.sleep(_REPORT_WAIT.total_seconds())
        return False
    try:
        store.wait([_REPORTED], _REPORT_WAIT)
    except dist.DistStoreError:
        return False
    except RuntimeError:  # the store went with rank 0, which had reported
        return True
    return True


def leave(code: int) -> NoReturn:
    """End this process; after a failure at once, for threads and objects of it may wait for ranks that have gone."""
    if code in (0, EXIT_STOPPED):
        sys.exit(code)
    for output in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            output.flush()
    os._exit(code)
