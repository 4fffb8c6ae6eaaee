"""A run that hangs says where, and ends.

Each rank has a thread that looks at the rank's place (`hive_ds.training.place`). Where that has not changed for
``training.hang_timeout`` seconds, the thread tells all other ranks through the process group's store; each writes a
dump, the lowest one says which rank the others wait for, and all exit with `EXIT_HUNG`, whatever their main threads are
stuck in. A rank that holds Python's lock cannot run this thread: C code then prints its stacks and ends it.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from hive_ds.constants import EXIT_HUNG
from hive_ds.training.distributed import TIMEOUT, World, all_values, current_store, from_main
from hive_ds.training.hang_report import Dump, dumped_ranks, free_folder, read_dumps, verdict, write_dump
from hive_ds.training.place import here

START_FACTOR = 2
"""Phases up to the end of the first step may take so many times longer: models are loaded, kernels are compiled."""
ANSWER_SECONDS = 15.0
"""How long ranks wait for each other's dumps; the store wakes all within a second, a shared folder takes longer."""
_SETTLE_SECONDS = 1.0
"""The rank that says what happened ends first, for the launcher kills all others then."""
_PATIENCE = ANSWER_SECONDS + 10
"""Seconds after which a rank ends although its dump is not written: the hanging thing may be the disk."""
_HUNG, _OVER = "hive_ds/hung", "over"


def longest_wait(hang_timeout: float) -> timedelta:
    """Timeout for collectives, above that of the watchdog, which says more."""
    return max(TIMEOUT, timedelta(seconds=START_FACTOR * hang_timeout + 10 * _PATIENCE))


class Watchdog:
    """Watches over this rank from `start` to `stop`.

    Args:
        folder: for the dumps, not there yet; shared by all ranks.
        rank: of this process.
        hosts: name of each rank's host.
        timeout: seconds without a change of phase that end the run; 0 switches the watchdog off.
        store: of the process group.
    """

    def __init__(self, folder: Path, rank: int, hosts: Sequence[str], timeout: float, store: dist.Store | None) -> None:
        self._folder, self._rank, self._hosts, self._timeout = folder, rank, hosts, timeout
        self._poll = min(5.0, timeout / 10)
        self._stopped, self._told = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # Connections of its own: the rank's may be in the hands of a thread that hangs.
        shared = store if timeout and len(hosts) > 1 else None
        self._store = None if shared is None else shared.clone()
        self._ear = None if shared is None else shared.clone()
        self._listener = threading.Thread(target=self._listen, name="watchdog-ear", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        if not self._timeout:
            return
        self._thread.start()
        if self._ear is not None:
            self._listener.start()

    def stop(self) -> None:
        """Stop watching: the work is done."""
        if not self._thread.is_alive():
            return
        if self._store is not None:  # still watched, for the rank that keeps the store may hang
            with suppress(RuntimeError):  # it has gone
                self._store.set(_HUNG, _OVER)
        self._stopped = True
        self._told.set()
        self._thread.join()
        if self._ear is not None:  # a thread that wakes up in the store's code while Python ends aborts the process
            self._listener.join(_PATIENCE)

    def _watch(self) -> None:
        idle, seen, before = 0.0, -1, time.monotonic()
        while True:
            limit = self._timeout * (START_FACTOR if here.steps_begun <= 1 else 1)
            # Exits with 1, for faulthandler knows no other code.
            faulthandler.dump_traceback_later(limit + _PATIENCE, exit=True, file=2)
            self._told.wait(self._poll)
            # A process that was stopped has not been idle: count what passed while this thread ran. faulthandler's own
            # clock goes on, though: whoever was stopped for longer than it waits ends when it goes on.
            now = time.monotonic()
            idle = 0.0 if here.marks != seen else idle + min(now - before, 2 * self._poll)
            seen, before = here.marks, now
            if self._told.is_set() or idle >= limit:
                break
        if self._stopped:
            faulthandler.cancel_dump_traceback_later()
            return
        reporter = threading.Thread(target=self._report, args=(idle,), daemon=True)
        reporter.start()
        reporter.join(_PATIENCE)
        os._exit(EXIT_HUNG)

    def _listen(self) -> None:
        """Sleep until a rank says that it hangs, or that the work is over."""
        assert self._ear is not None
        try:
            self._ear.wait([_HUNG], timedelta(days=3650))
            over = self._ear.get(_HUNG) == _OVER.encode()
        except RuntimeError:  # the store has gone with the rank that kept it, and with the run
            return
        if not over:
            self._told.set()

    def _report(self, idle: float) -> None:
        if self._store is not None:  # may wait for ever where the rank that keeps the store is stopped
            threading.Thread(target=self._store.set, args=(_HUNG, str(self._rank)), daemon=True).start()
        dump = Dump(rank=self._rank, idle=idle, **here.describe())
        _say(f"hang: {dump.line()}")
        write_dump(self._folder, dump)
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(ranks := dumped_ranks(self._folder)) < len(self._hosts) and time.monotonic() < deadline:
            time.sleep(0.2)
        if self._rank == ranks[0]:
            text = verdict(read_dumps(self._folder), self._hosts)
            _say(f"hang: {text}; dumps in {self._folder}")
            (self._folder / "verdict.txt").write_text(f"{text}\n")
        else:
            time.sleep(_SETTLE_SECONDS)


_active: list[Watchdog] = []
"""The one that watches over this process, if there is one."""


def watch(folder: Path, world: World, timeout: float) -> None:
    """Watch over this rank until `stop_watching`; every rank calls it, within the process group.

    Args:
        folder: for the dumps, with a number behind its name where an earlier attempt has left some.
        world: this process among all.
        timeout: seconds (`Watchdog`).
    """
    own_folder = from_main(free_folder(folder))
    _active.append(Watchdog(own_folder, world.rank, all_values(socket.gethostname()), timeout, current_store()))
    _active[-1].start()


def stop_watching() -> None:
    """The work is done, or has failed: nothing more will move."""
    while _active:
        _active.pop().stop()


def _say(text: str) -> None:
    """Past Python's stderr, whose lock the thread that hangs may hold; on a line of its own, below the progress bar."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
