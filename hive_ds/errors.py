"""The one exception that means "the input is wrong", and how a command reports it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

INTERRUPTED = 130
"""Exit code after Ctrl-C, a shell's own."""


class HiveError(Exception):
    """Wrong input from the user. The message is one line that names the thing, its value and what was expected."""


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
