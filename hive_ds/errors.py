"""The one exception that means "the input is wrong", and how a command reports it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable


class HiveError(Exception):
    """Wrong input from the user. The message is one line that names the thing, its value and what was expected."""


def run_command(command: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run ``command`` and return its exit code: a `HiveError` becomes one line on stderr and exit code 2.

    With ``debug`` the stack trace is printed above that line.
    """
    try:
        return command() or 0
    except HiveError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
