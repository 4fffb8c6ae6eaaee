"""The one exception that means "the input is wrong", and how a command reports it.

What the user can mend is exit code 2: nothing starts such a job again. What fails outside, a full or failing disk,
memory, a server, is exit code 1: the same command may succeed later.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = 130
"""Exit code after Ctrl-C, a shell's own, which adds 128 to the number of a signal."""

_WRONG_PATHS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
"""Errors of a path that is not what it should be, or of one that cannot be one."""
_NO_MEMORY = ("out of memory", "allocate memory")
"""In the text of torch's errors: a GPU's, and its CPU allocator's and the kernel's."""
_LONGEST_REASON = 300
"""Characters; transformers lists hundreds of kinds of models."""


class HiveError(Exception):
    """Wrong input from the user. The message is one line that names the thing, its value and what was expected."""

    exit_code = 2


class OutsideError(HiveError):
    """The input may be right, but a disk, memory or a server fails: another try may succeed."""

    exit_code = 1


class Signalled(KeyboardInterrupt):
    """The command is to end, as by Ctrl-C, but another signal says so."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def require_one_of(what: str, value: str, choices: Iterable[str]) -> None:
    """HiveError where ``value``, of what is called ``what``, is none of ``choices``."""
    if value not in choices:
        raise HiveError(f"{what} {value!r}: expected one of {', '.join(choices)}")


def one_line(error: BaseException) -> str:
    """Kind and words of an error of another library."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def names_wrong_path(error: BaseException) -> bool:
    """Whether a path is at fault, as the user gave it, and not the disk below it."""
    return isinstance(error, OSError) and error.errno in _WRONG_PATHS


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, of a GPU or of the host."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(part in words for part in _NO_MEMORY)
    )


@contextmanager
def told_as(what: str, expected: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a `HiveError` of one line: ``what``, the reason, what was ``expected``.

    For readers of other libraries, which say in many ways that files are not what they should be. A disk or memory that
    fails stays as it is: trying again may help.
    """
    try:
        yield
    except HiveError:
        raise
    except Exception as error:
        disk = isinstance(error, OSError) and error.errno is not None and not names_wrong_path(error)
        if disk or out_of_memory(error):
            raise
        name = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split()).rstrip(".")
        short = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."
        raise HiveError(f"{what}: {name}{short}; expected {expected}") from error


def run_command(command: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run ``command`` and return its exit code: what goes wrong outside of the program becomes one line on stderr.

    A `HiveError` has its exit code. A file that cannot be read or written is 2 where its path is wrong and else 1, as
    memory that is full; Ctrl-C is 130, SIGTERM 143. A pipe that nobody reads any more is 141, and no line. With
    ``debug`` the stack trace is printed above that line.
    """
    try:
        done = command() or 0
        print(end="", flush=True)  # else a pipe whose reader has gone is a trace at exit
        return done
    except (Exception, KeyboardInterrupt) as error:
        if _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at exit
            if isinstance(error, BrokenPipeError):
                return 128 + signal.SIGPIPE
        code = _exit_code(error)
        if code is None:
            raise
        if debug:
            traceback.print_exc()
        print(_line_of(error), file=sys.stderr)
        return code


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone, as in ``| head``: it wants no more, and no error either."""
    output = select.poll()
    with suppress(OSError, TypeError):  # it is no file, or closed
        output.register(sys.stdout, 0)
    return any(happened & select.POLLERR for _, happened in output.poll(0))


def _exit_code(error: BaseException) -> int | None:
    """None for an error of the program."""
    if isinstance(error, (HiveError, Signalled)):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if names_wrong_path(error):
        return HiveError.exit_code
    return OutsideError.exit_code if isinstance(error, OSError) or out_of_memory(error) else None


def _line_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "\nstopped"
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"error: out of memory {error}".rstrip()
    return f"error: {' '.join(str(error).split())}"
