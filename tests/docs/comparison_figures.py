"""Figures of the comparison at small scale: page, words around them, result file, their keys in it, scale."""

from __future__ import annotations

import re
from typing import Any

Row = tuple[str, str, str, tuple[Any, ...], float]

COMPARISON = "docs/results/compare.json"
LOW, HIGH = ("interval_95", 0), ("interval_95", 1)
NUMBER = r"([\d.]+)"


def _arms(label: str, score: str) -> Row:
    """A row of the comparison's table: mean and standard deviation of HIVE, SA, last and base, in percent."""
    cells = rf" \| {NUMBER} ± {NUMBER}" * 4
    paths = [("summary", arm, score, value) for arm in ("hive", "sa", "last", "base") for value in ("mean", "std")]
    return "docs/ablations.md", re.escape(label) + cells, COMPARISON, tuple(paths), 100


def _contrast(reference: str, *values: Any, score: str = "answers all") -> tuple[Any, ...]:
    """Values of the contrast of HIVE with another arm."""
    chosen = {"score": score, "arm": "hive", "reference": reference}
    return tuple(("contrasts", chosen, *(value if isinstance(value, tuple) else (value,))) for value in values)


def _probes(reference: str, *names: str) -> tuple[Any, ...]:
    """Mean differences of HIVE's probes from those of another arm."""
    return tuple(_contrast(reference, "mean", score=f"probe {name}")[0] for name in names)


def _of_ablations(text: str, paths: tuple[Any, ...]) -> Row:
    return "docs/ablations.md", text, COMPARISON, paths, 100


def _of_readme(text: str, paths: tuple[Any, ...]) -> Row:
    return "README.md", text, COMPARISON, paths, 100


COMPARISON_FIGURES: tuple[Row, ...] = (
    ("docs/ablations.md", r"32 runs in (\d+) minutes", COMPARISON, (("seconds_by_step", "runs"),), 1 / 60),
    _arms("answers of the LLaVA-style model, 1,200 questions", "answers all"),
    _arms("the same, pictures shuffled", "answers all, pictures shuffled"),
    *(_arms(f"probe of {factor}", f"probe {factor}") for factor in ("colour", "shape", "size", "count", "text")),
    _arms("probe of relation (a blind guess gets 25)", "probe relation"),
    _of_ablations(
        rf"\+{NUMBER} points of answers \(interval \+{NUMBER} to \+{NUMBER}\)", _contrast("base", "mean", LOW, HIGH)
    ),
    _of_ablations(r"\+(\d+) to \+(\d+) points in the probes", _probes("base", "text", "shape")),
    _of_ablations(
        rf"(-[\d.]+) points of answers, interval (-[\d.]+) to \+{NUMBER}; a difference of {NUMBER} points",
        _contrast("sa", "mean", LOW, HIGH, "detectable"),
    ),
    _of_ablations(
        rf"in colour \(\+{NUMBER} points\), count \(\+{NUMBER}\), size \(\+{NUMBER}\) and text \(\+{NUMBER}\)",
        _probes("sa", "colour", "count", "size", "text"),
    ),
    _of_ablations(
        rf"\+{NUMBER} points of answers, interval (-[\d.]+) to \+{NUMBER}\.", _contrast("last", "mean", LOW, HIGH)
    ),
    _of_ablations(rf"interval of colour \(\+{NUMBER} points\)", _probes("last", "colour")),
    _of_readme(
        rf"answers {NUMBER} points more of the held-out questions than one with the untouched encoder "
        rf"\(95 % interval \+{NUMBER} to \+{NUMBER}\)",
        _contrast("base", "mean", LOW, HIGH),
    ),
    _of_readme(rf"by {NUMBER} to\s+{NUMBER} points", _probes("sa", "colour", "text")),
)
