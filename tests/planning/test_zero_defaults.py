"""The table of docs/planning.md by model size is what the script prints."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "results" / "zero_defaults.py"))
ROWS = [(stage, size) for stage in SCRIPT["STAGES"] for size in SCRIPT["SIZES"]]
FAST = (3, "paper")


@pytest.mark.parametrize(
    ("stage", "size"), [row if row == FAST else pytest.param(*row, marks=pytest.mark.long) for row in ROWS]
)
def test_row_is_what_the_plan_says(stage: int, size: str) -> None:
    lines = (DOCS / "planning.md").read_text().splitlines()
    first = lines.index(SCRIPT["HEAD"][0])
    assert tuple(lines[first : first + 2]) == SCRIPT["HEAD"]
    shown = lines[first + 2 : first + 2 + len(ROWS)]
    assert shown[ROWS.index((stage, size))] == SCRIPT["row_of"](stage, size)
    assert not lines[first + 2 + len(ROWS)].startswith("|")
