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
_ACROSS = {"text_length": "text tokens of a sample", "batch": "samples of a batch"}
"""Names of the x axes."""


def draw(curves: dict[str, Any]) -> bytes:
    """A PNG of four panels over one legend: FLOPs without and with the encoder, memory saved by length and by batch.

    Args:
        curves: of `hive_ds.cost.claims.compare`.
    """
    setup = next(iter(SETUPS))
    flops, memory = curves["flops"], curves["memory"]
    by_length = [point for point in memory if point["batch"] == MICRO_BATCH]
    by_batch = sorted((point for point in memory if point["text_length"] == CAPTION), key=lambda point: point["batch"])
    figure = Figure(figsize=(11, 9.5), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2)
    _lines(panels[0, 0], flops, lambda point: point["ratio_without_encoder"])
    _finish(panels[0, 0], "Encoder not counted", "FLOPs of HIVE / SA", FLOPS, f"paper: {FLOPS}x")
    _lines(panels[0, 1], flops, lambda point: 1 / point["ratio"])
    _finish(panels[0, 1], "Encoder counted: bound on speed", "FLOPs of SA / HIVE", SPEED, f"paper: {SPEED}x faster")
    for axes, points, title, across, side in (
        (panels[1, 0], by_length, f"Memory, {setup}, batch {MICRO_BATCH}", "text_length", "right"),
        (panels[1, 1], by_batch, f"Memory, {setup}, {CAPTION} text tokens", "batch", "left"),
    ):
        _lines(axes, points, lambda point: 100 * point["saved"][setup], across)
        _finish(axes, title, "saved of SA's peak memory, %", 100 * MEMORY, f"paper: {100 * MEMORY:.1f} %", side)
    names = panels[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=len(_COLOURS), fontsize=12)
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
            axes.plot(xs, ys, style, color=_COLOURS[stage], linewidth=2, marker="o", markersize=4, label=label)
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.set_xlabel(_ACROSS[across], fontsize=12)


def _finish(axes: Axes, title: str, y_label: str, claim: float, paper: str, side: str = "right") -> None:
    axes.axhline(claim, color="black", linewidth=1.5, linestyle=":")
    at, shift = (1, -6) if side == "right" else (0, 6)
    axes.annotate(paper, (at, claim), (shift, 4), ("axes fraction", "data"), "offset points", ha=side, fontsize=11)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_title(title, fontsize=13)
    axes.set_ylabel(y_label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
