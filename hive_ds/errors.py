"""The one exception that means "the input is wrong", and how a command reports it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after Ctrl-C, a shell's own."""

_WRONG_PATHS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_LONGEST_REASON = 300
"""Characters; transformers lists hundreds of kinds of models."""


class HiveError(Exception):
    """Wrong input from the user. The message is one line that names the thing, its value and what was expected."""


@contextmanager
def told_as(what: str, expected: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a `HiveError` of one line: ``what``, the reason, what was ``expected``.

    For readers of other libraries, which say in many ways that files are not what they should be. A disk or memory that
    fails stays as it is: trying again may help.
    """
    try:
        yield
    except (HiveError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _WRONG_PATHS):
            raise
        name = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split()).rstrip(".")
        short = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."
        raise HiveError(f"{what}: {name}{short}; expected {expected}") from error


def run_command(command: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run ``command`` and return its exit code: a `HiveError` becomes one line on stderr and exit code 2.

    So does a file that cannot be read or written; Ctrl-C is exit code 130. With ``debug`` the stack trace is printed
    above that line.
    """
    try:
        return command() or 0
    except (HiveError, OSError, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        print(_line_of(error), file=sys.stderr)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2


def _line_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "\nstopped"
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}"
    return f"error: {error}"
