"""What a command starts ends with it: programs with all that they have started, and the processes of a pool."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hive_ds.errors import Signalled

_VARIABLE = "HIVE_COMMAND"
"""Names the command that started a process, however indirectly."""
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""That end a command, beside Ctrl-C; the second comes when the terminal has gone."""
_GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL: loader workers see within 5 that their rank has gone."""
_DEATH = 30.0
"""Seconds for killed processes to go; one that waits for a dead disk may never."""
_POLL = 0.05
_GUARD = "from hive_ds.children import _end_when_left; _end_when_left()"
_PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when the one that started it ends."""


class Programs:
    """Programs that a command runs, in its main thread or in others; none outlives a ``with`` block that is broken off.

    SIGTERM, and a terminal that goes, raise `Signalled` in the block, as Ctrl-C raises KeyboardInterrupt. Launchers put
    ranks into sessions of their own and leave them behind when they are killed, so processes are known by a variable
    that all of them inherit. A terminal's Ctrl-C reaches the command alone. Where the command itself is killed, a guard
    ends them: a process that waits for nothing else.
    """

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex
        self._starting, self._ending = threading.Lock(), False
        self._left_some = False
        """A program was killed: what it started goes on."""

    def run(self, command: Sequence[str], env: Mapping[str, str], output: IO[str] | None = None) -> int:
        """Run a program to its end and return its exit code, minus the signal that ended it; OSError: there is none."""
        with self._starting:
            if self._ending:
                return -signal.SIGTERM
            process = subprocess.Popen(
                command, env={**env, _VARIABLE: self._name}, stdout=output, stderr=output, start_new_session=True
            )
        code = process.wait()
        self._left_some |= code < 0
        return code

    def __enter__(self) -> Programs:
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        self._before = {number: signal.signal(number, _raise) for number in heard}
        self._guard = _guard(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or self._left_some:
            before = {number: signal.signal(number, signal.SIG_IGN) for number in (*self._before, signal.SIGINT)}
            with self._starting:
                self._ending = True
            _end_all(self._name)
            signal.signal(signal.SIGINT, before[signal.SIGINT])
        self._guard.kill()
        self._guard.communicate()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _guard(name: str) -> subprocess.Popen[bytes]:
    """Start a process that ends all programs with this name once this process has ended, however it did."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environ.pop(_VARIABLE, None)  # of a command that has started this one, and kills it where it does not end
    return subprocess.Popen(
        [sys.executable, "-c", _GUARD, name],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end_when_left() -> None:
    """What a guard does: nobody writes to its stdin, whose other end its command holds until it ends."""
    sys.stdin.buffer.read()
    _end_all(sys.argv[1])


def _end_all(name: str) -> None:
    """End all programs with this name: ask them, and kill those that do not answer."""
    for process in processes_with(_VARIABLE, name):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while processes_with(_VARIABLE, name) and time.monotonic() < deadline:
        time.sleep(_POLL)
    kill_with(_VARIABLE, name)


def _raise(number: int, frame: object) -> None:
    raise Signalled(number)


def kill_with(variable: str, value: str) -> list[int]:
    """Kill all `processes_with` this value; returns those that do not end."""
    deadline = time.monotonic() + _DEATH
    while (processes := processes_with(variable, value)) and time.monotonic() < deadline:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(_POLL)
    return processes


def processes_with(variable: str, value: str) -> list[int]:
    """Processes of this user on this machine that were started with this value of an environment variable."""
    entry, found = f"{variable}={value}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # of another user, or gone
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


Submit = Callable[..., Future[Any]]
"""Of a function and its arguments, for a process of a pool."""


@contextmanager
def process_pool(count: int, method: str, start: Callable[..., object], *arguments: object) -> Iterator[Submit]:
    """``count`` processes that ``method`` makes, each of which calls ``start`` first; yields what gives them work.

    They end with this process, however that ends, and at once where the block is broken off: nobody waits for what they
    are at. Ctrl-C, which a terminal sends to them too, reaches this process alone.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(count, context, _begin, (os.getpid(), start, arguments))

    def submit(function: Callable[..., Any], *of: object) -> Future[Any]:
        """The first calls start the processes, which inherit what signals are blocked."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(function, *of)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield submit
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int, start: Callable[..., object], arguments: Sequence[object]) -> None:
    """Tie this process to its parent: else it would wait for work for ever, and hold what it has locked."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # which ended before the line above
        os._exit(1)
    start(*arguments)
