"""The curves of the paper's claims as one picture, drawn from the JSON that `hive-ds cost --curves` writes."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hive_ds.cost.claims import CAPTION, FLOPS, MEMORY, MICRO_BATCH, SETUPS, SPEED

_COLOURS = {1: "tab:blue", 2: "tab:orange", 3: "tab:green"}
_STYLES = ("-", "--")
"""Of most routes, and of fewer."""


def draw(curves: dict[str, Any]) -> bytes:
    """A PNG of four panels: share of FLOPs without and with the encoder, bound on speed, memory saved.

    Args:
        curves: of `hive_ds.cost.claims.compare`.
    """
    figure = Figure(figsize=(11, 8), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2)
    flops, memory = curves["flops"], curves["memory"]
    _lines(panels[0, 0], flops, lambda point: point["ratio_without_encoder"])
    _finish(panels[0, 0], "FLOPs of HIVE / SA, encoder not counted", FLOPS, f"paper: {FLOPS}x")
    _lines(panels[0, 1], flops, lambda point: 1 / point["ratio"])
    _finish(panels[0, 1], "FLOPs of SA / HIVE, encoder counted: bound on speed", SPEED, f"paper: {SPEED}x faster")
    setup = next(iter(SETUPS))
    by_length = [point for point in memory if point["batch"] == MICRO_BATCH]
    _lines(panels[1, 0], by_length, lambda point: 100 * point["saved"][setup])
    paper = f"paper: -{100 * MEMORY:.1f} %"
    _finish(panels[1, 0], f"% of SA's peak memory saved, {setup}, batch {MICRO_BATCH}", 100 * MEMORY, paper)
    by_batch = sorted((point for point in memory if point["text_length"] == CAPTION), key=lambda point: point["batch"])
    _lines(panels[1, 1], by_batch, lambda point: 100 * point["saved"][setup], "batch")
    _finish(panels[1, 1], f"% of SA's peak memory saved, {setup}, {CAPTION} text tokens", 100 * MEMORY, paper, "batch")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _lines(axes: Axes, points: list[dict[str, Any]], value: Any, across: str = "text_length") -> None:
    axes.set_xscale("log", base=2)
    for stage in sorted({point["stage"] for point in points}):
        for routes, style in zip(sorted({point["routes"] for point in points}, reverse=True), _STYLES, strict=True):
            own = [point for point in points if (point["stage"], point["routes"]) == (stage, routes)]
            xs, ys = [point[across] for point in own], [value(point) for point in own]
            label = f"stage {stage}, {routes} routes"
            axes.plot(xs, ys, style, color=_COLOURS[stage], marker="o", markersize=3, label=label)
    axes.set_xticks(xs, [str(x) for x in xs])


def _finish(axes: Axes, title: str, claim: float, paper: str, across: str = "text tokens of a sample") -> None:
    axes.axhline(claim, color="black", linewidth=1, linestyle=":", label=paper)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(across, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
