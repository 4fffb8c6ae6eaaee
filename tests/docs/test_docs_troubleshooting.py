"""Messages that the troubleshooting page quotes are messages of the sources, and its tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from doc_pages import ROOT, blocks, read

PAGE = "docs/troubleshooting.md"
FEWEST_LETTERS = 12
"""A message with fewer letters of its own says nothing about a quotation."""
LEAST_SHARE = 0.75
"""Of a quotation, what messages have to explain; the rest may be a cause that is filled in."""
LONGEST_VALUE = 60
"""Characters of what stands for one value; longer, a hole of a message would explain anything."""


@cache
def messages() -> list[list[str | None]]:
    """Every text of the sources in which something is said, in pieces, with None where a value is filled in."""
    found: list[list[str | None]] = []
    for path in sorted((ROOT / "hive_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append([part.value if isinstance(part, ast.Constant) else None for part in node.values])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append([node.value])
    for path in sorted((ROOT / "slurm").glob("*.sh")):
        for said in re.findall(r'(?:say|fail|requeue) "([^"]+)"', path.read_text()):
            pieces = re.split(r"(\$\w+|\$\{[^}]*\})", said)
            found.append([None if piece[:1] == "$" else piece for piece in pieces])
    return [parts for parts in found if sum(len(part) for part in parts if part) >= FEWEST_LETTERS]


def _pattern(parts: list[str | None]) -> re.Pattern[str]:
    hole = f"(?:.{{0,{LONGEST_VALUE}}}?)"
    ends = [f".{{0,{LONGEST_VALUE}}}" if parts[place] is None else "" for place in (0, -1)]
    inside = parts[parts[0] is None : len(parts) - (parts[-1] is None)]
    return re.compile(ends[0] + "".join(hole if part is None else re.escape(part) for part in inside) + ends[1])


def explained(quotation: str) -> float:
    """The share of a quotation that messages of the sources, each in whole, are found in."""
    covered = set()
    for parts in messages():
        pieces_are_there = all(part is None or part in quotation for part in parts)
        if pieces_are_there and (match := _pattern(parts).search(quotation)):
            covered.update(range(*match.span()))
    return len(covered) / len(quotation)


QUOTATIONS = [line for block in blocks(PAGE) if block.language == "text" for line in block.text.splitlines()]


@pytest.mark.parametrize("quotation", QUOTATIONS, ids=range(len(QUOTATIONS)))
def test_quoted_messages_are_said_by_the_code(quotation: str):
    assert explained(quotation) >= LEAST_SHARE


def test_a_message_that_nothing_says_is_found():
    assert explained("global_batch_size 1024 cannot be shared out over 12 ranks; take another number") < LEAST_SHARE
    assert explained("checkpoint a is not there") < LEAST_SHARE


def test_every_entry_names_tests_that_exist():
    entries = re.split(r"^### ", read(PAGE), flags=re.M)[1:]
    assert len(entries) >= 27
    for entry in entries:
        title = entry.splitlines()[0]
        tests = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", entry.partition("\nTest: ")[2])
        assert tests, title
        for path, name in tests:
            text = (ROOT / path).read_text()
            assert not name or re.search(rf"def {name}\b", text), (title, path, name)
