"""What a recipe value may be, written beside the field it belongs to.

A field of `hive_ds.config` is declared as ``Annotated[type, Check]``; the reader of recipes (`hive_ds.recipe_values`)
looks the checks up there, so a rule stands once, at its field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hive_ds.errors import HiveError


@dataclass(frozen=True)
class Check:
    """One rule on a value of the right type: what it expects, in words, and whether a value passes."""

    expected: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()
    """The words that are allowed, where there is a closed list: an error names the nearest."""


def one_of(*choices: str) -> Check:
    """A word from a closed list."""
    return Check(f"one of {', '.join(choices)}", lambda value: value in choices, choices)


def at_least(minimum: int) -> Check:
    """A number from ``minimum`` up."""
    return Check(f">= {minimum}", lambda value: value >= minimum)


def or_word(check: Check, word: str) -> Check:
    """``check``, or one word."""
    return Check(f"{check.expected}, or {word}", lambda value: value == word or check.accepts(value), (word,))


def every(check: Check) -> Check:
    """``check`` holds for each value of a non-empty list."""

    def accepts(values: Iterable[Any]) -> bool:
        values = list(values)
        return bool(values) and all(check.accepts(value) for value in values)

    return Check(f"at least one, each {check.expected}", accepts)


def every_value(check: Check) -> Check:
    """``check`` holds for each value of a mapping, which may be empty."""
    return Check(f"each value {check.expected}", lambda values: all(check.accepts(value) for value in values.values()))


def keys_from(*choices: str) -> Check:
    """The keys of a non-empty mapping come from a closed list."""
    return Check(f"keys out of {', '.join(choices)}", lambda value: bool(value) and set(value) <= set(choices), choices)


POSITIVE = Check("> 0", lambda value: value > 0)
NOT_ZERO = Check("not 0", lambda value: value != 0)
NOT_NEGATIVE = Check(">= 0", lambda value: value >= 0)
SHARE = Check("from 0 to 1", lambda value: 0 <= value <= 1)
FACTOR = Check("above 0 and at most 1", lambda value: 0 < value <= 1)
BETA = Check("from 0 up to, not including, 1", lambda value: 0 <= value < 1)
RISING = Check("the first >= 1, the last not below it", lambda value: 1 <= value[0] <= value[1])
"""Two whole numbers that bound a range."""
NOT_EMPTY = Check("not empty", lambda value: len(value) > 0)
FOLDERS = Check(
    "not empty, each weight > 0",
    lambda value: len(value) > 0 and (isinstance(value, str) or all(weight > 0 for weight in value.values())),
)
"""One folder, or folders with their weights."""
BYTES = Check("a size such as 100gb", lambda value: bool(re.fullmatch(r"\d+(\.\d+)? *[kmgt]b", value.lower())))


def check_seeds(seeds: Sequence[int]) -> None:
    """HiveError where there is none, or one twice: of commands that run once a seed."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise HiveError(f"seeds: {', '.join(map(str, seeds)) or 'none'}; expected at least one, each once")
