"""A histogram with its quantiles: as text, as a picture, as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hive_ds.page import table
from hive_ds.plots import bar_plot, short

BINS = 24
"""Bars at most. Values that are whole numbers and no more than this apart get a bar each."""
TAIL = 0.005
"""Share of the values at either end that may lie beyond the bars; the first and last bar count them, too."""
QUANTILES = {"min": 0.0, "1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99, "max": 1.0}
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Histogram:
    """Counts of ``number`` values in bars.

    ``edges`` has a value more than ``counts``; with ``whole`` each bar is one whole number, its left edge.
    """

    name: str
    number: int
    mean: float
    quantiles: dict[str, float]
    counts: list[int]
    edges: list[float]
    whole: bool

    @classmethod
    def of(cls, name: str, values: npt.NDArray[Any]) -> Histogram:
        """Count ``values``, one at least."""
        quantiles = dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True))
        low, high = float(values.min()), float(values.max())
        whole = bool(np.issubdtype(values.dtype, np.integer)) and high - low < BINS
        if whole:
            edges = np.arange(low, high + 2)
        elif low == high:
            edges = np.array([low, high])
        else:
            first, last = np.quantile(values, [TAIL, 1 - TAIL]).tolist()
            edges = np.linspace(first, last, BINS + 1) if first < last else np.linspace(low, high, BINS + 1)
        counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
        return cls(name, len(values), float(values.mean()), quantiles, counts.tolist(), edges.tolist(), whole)

    def as_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "number": self.number,
            "mean": self.mean,
            "quantiles": self.quantiles,
            "counts": self.counts,
            "edges": self.edges,
        }

    def as_text(self) -> str:
        """Two lines: the bars between the outermost edges, and the quantiles."""
        top = max(self.counts)
        # A bar that counts anything is never drawn as nothing.
        bars = "".join(BLOCKS[-(-count * (len(BLOCKS) - 1) // top)] for count in self.counts)
        last = self.edges[-2] if self.whole else self.edges[-1]
        quantiles = "  ".join(f"{name}={short(value)}" for name, value in self.quantiles.items())
        return (
            f"{self.name:<20} {short(self.edges[0]):>6} {bars} {short(last)}\n    {quantiles}  mean={short(self.mean)}"
        )

    def as_html(self) -> str:
        """A heading, the bars, and a table of the quantiles."""
        labels = [short(edge) for edge in (self.edges[:-1] if self.whole else self.edges)]
        names, values = zip(*self.quantiles.items(), strict=True)
        rows = [[*names, "mean", "number"], [*map(short, values), short(self.mean), str(self.number)]]
        plot = bar_plot(self.counts, labels, self.name, between=not self.whole)
        return f"<h2>{self.name.capitalize()}</h2>{plot}{table(rows)}"
