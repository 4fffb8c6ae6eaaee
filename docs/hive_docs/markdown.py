"""Tables and cells of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MADE = "<!-- Made from the code by `make docs`; changes here are lost. -->\n"
"""First line of every page that is made."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its cells Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(text: str) -> str:
    """Plain text for a cell: one line, nothing in it taken for a column or a tag."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Text as code, for a cell or a sentence."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", "\\|")


def from_docstring(text: str) -> str:
    """A docstring's text for a cell: its double backquotes become Markdown's."""
    parts = re.split(r"``?(.+?)``?", " ".join(text.split()))
    return "".join(code(part) if place % 2 else cell(f"_{part}_")[1:-1] for place, part in enumerate(parts))
