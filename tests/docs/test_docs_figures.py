"""Every figure with a unit in README and docs has an origin, and equals it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from doc_pages import ROOT, blocks, page_names, read
from figures import FIGURES, Chosen, FromFile, Logged, Measured, Path, Reckoned

UNITS = r"%|times|points|minutes?|hours?|seconds?|s|ms|µs|ns|[kMGT]B|[kMG]iB|TFLOP/s|GB/s"
FIGURE = re.compile(rf"(?<![\w.])\d[\d.,]*(?: to \d[\d.,]*)? (?:{UNITS})(?![\w/])|(?<![\w.])\d[\d.]*%")
ELSEWHERE = ("CHANGELOG.md", "docs/lab_log.md", "docs/reference/recipes.md", "docs/reference/commands.md")
"""The log is an origin itself; the reference is made from the code."""
PAGES = [page for page in page_names() if page not in ELSEWHERE]
SCALES = (1, 100, 1 / 60, 1 / 3600, 1e3, 1e6, 1e-3, 1e-6, 1e-9, 1e-12)
"""From the units of result files to those of pages."""


def text_of(page: str) -> str:
    """The page as one line, without code blocks but those of commands, whose comments state figures too."""
    lines = read(page).splitlines()
    for block in blocks(page):
        if block.language != "bash":
            last = block.line + block.text.count("\n") + (2 if block.language else 0)
            lines[block.line - 1 : last] = [""] * (last - block.line + 1)
    return " ".join(" ".join(lines).split())


def section_of(page: str, heading: str) -> str:
    """Text below a heading, up to the next one of its rank or a higher one."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,6}} |\Z)", read(page), re.M | re.S)
    assert found, f"{page} has no heading {heading!r}"
    return " ".join(found[2].split())


def spans(page: str) -> Iterator[tuple[int, int]]:
    """Parts of the page's text that rows of `FIGURES` speak of."""
    text = text_of(page)
    for row in FIGURES:
        if row.page == page and isinstance(row, FromFile):
            section = section_of(page, row.heading)
            start = text.index(section)
            yield start, start + len(section)
        elif row.page == page:
            yield from (match.span() for match in re.finditer(row.text, text))


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_has_an_origin(page: str):
    text, covered = text_of(page), list(spans(page))
    without = [
        text[max(0, match.start() - 40) : match.end() + 10]
        for match in FIGURE.finditer(text)
        if not any(start <= match.start() and match.end() - 1 <= end + 12 for start, end in covered)
    ]
    assert without == [], "add rows to tests/docs/figures.py"


@pytest.mark.parametrize("row", FIGURES, ids=lambda row: f"{row.page}-{getattr(row, 'text', '')}"[:60])
def test_figures_are_those_of_their_origins(row: Any):
    if isinstance(row, FromFile):
        known = numbers((ROOT / row.file).read_text())
        shown = [one for match in FIGURE.finditer(section_of(row.page, row.heading)) for one in _digits(match[0])]
        assert [
            one for one in shown if not any(_equal(one, scale * value) for value in known for scale in SCALES)
        ] == []
        return
    matches = list(re.finditer(row.text, text_of(row.page)))
    assert matches, "not on the page any more"
    for match in matches:
        if isinstance(row, Measured):
            content = json.loads((ROOT / row.file).read_text())
            values = [_value(content, path) * row.scale for path in row.paths]
            assert [_equal(one, value) for one, value in zip(match.groups(), values, strict=True)] == [True] * len(
                values
            )
        elif isinstance(row, Reckoned):
            assert all(_equal(one, value) for one, value in zip(match.groups(), row.values, strict=True)), row.values
        elif isinstance(row, Logged):
            entry = _log_entry(row.entry)
            assert [one for one in match.groups() if one not in entry] == []
        elif isinstance(row, Chosen):
            assert row.source in (ROOT / row.file).read_text(), f"{row.file} does not say {row.source} any more"


def _value(content: Any, path: Path) -> float:
    for key in path:
        chosen = isinstance(key, dict)
        content = next(item for item in content if key.items() <= item.items()) if chosen else content[key]
    return float(str(content).removesuffix(" %"))


def _equal(shown: str, value: float) -> bool:
    """Whether a value, rounded to the digits that are shown, is what is shown."""
    digits = shown.replace(",", "").rstrip(".")
    decimals = len(digits.partition(".")[2])
    return abs(float(digits) - value) <= 0.5 * 10**-decimals * (1 + 1e-6)


def _digits(figure: str) -> list[str]:
    return re.findall(r"\d[\d,]*(?:\.\d+)?", figure)


def numbers(text: str) -> list[float]:
    """Every number in a result file."""
    return [float(one) for one in re.findall(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", text)]


def _log_entry(heading: str) -> str:
    entries = re.split(r"^## ", read("docs/lab_log.md"), flags=re.M)
    (found,) = [entry for entry in entries if heading in entry.splitlines()[0]]
    return found


def test_rounding_is_by_the_digits_shown():
    assert _equal("9.1", 548.4 / 60)
    assert _equal("2.3", 2.25)
    assert _equal("12,578", 12578)
    assert not _equal("9.2", 548.4 / 60)
    assert not _equal("33", 33.51)
