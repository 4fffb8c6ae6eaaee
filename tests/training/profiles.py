"""Reads the summary of a profile."""

from __future__ import annotations

import re


def shares(summary: str) -> dict[str, dict[str, float]]:
    """Percent by kind of ``work`` and by ``part`` of the model."""
    found: dict[str, dict[str, float]] = {"work": {}, "part": {}}
    for line in summary[: summary.index("└")].splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        for column, (name, share) in zip(found, zip(cells[::2], cells[1::2], strict=False), strict=False):
            if re.fullmatch(r"[\d.]+ %", share):
                found[column][name] = float(share.removesuffix(" %"))
    return found
