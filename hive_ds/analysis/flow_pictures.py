"""Gradient flow of several models in one plot: norm against depth; what routes are worth; drift from the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hive_ds.analysis.attention_pictures import DPI, rendered
from hive_ds.analysis.flow import Flow

WIDTH, HEIGHT = 760, 380
"""Pixels of one plot."""


def flow_figure(flows: Sequence[Flow]) -> Image.Image:
    """One plot below the other, of what was measured; every model has one colour throughout."""
    drawn = [_draw_norms]
    drawn += [_draw_routes] if any(flow.knocked_out for flow in flows) else []
    drawn += [_draw_similarity] if any(flow.similarity for flow in flows) else []
    size = (WIDTH / DPI, len(drawn) * HEIGHT / DPI)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    for draw, axes in zip(drawn, figure.subplots(len(drawn), squeeze=False)[:, 0], strict=True):
        draw(axes, flows)
        axes.spines[["top", "right"]].set_visible(False)
    return rendered(figure)


def _draw_norms(axes: Any, flows: Sequence[Flow]) -> None:
    for number, flow in enumerate(flows):
        _line(axes, flow, flow.norms, f"C{number}")
    axes.set_yscale("log")
    axes.set_ylabel("norm of the loss gradient")
    axes.set_title("Gradient at each encoder block (ringed: the LLM reads it; no point: no gradient)", fontsize=11)
    _finish_blocks(axes, flows)


def _draw_similarity(axes: Any, flows: Sequence[Flow]) -> None:
    for number, flow in enumerate(flows):
        _line(axes, flow, flow.similarity, f"C{number}")
    lowest = min(min(flow.similarity.values()) for flow in flows)
    axes.set_ylim(lowest - 0.1 * (1.01 - lowest), 1.01)
    axes.set_ylabel("linear CKA")
    axes.set_title("Similarity of each block's features to the initial encoder's (1: as at the start)", fontsize=11)
    _finish_blocks(axes, flows)


def _draw_routes(axes: Any, flows: Sequence[Flow]) -> None:
    """A bar for each route, model beside model."""
    labels: list[str] = []
    for number, flow in enumerate(flows):
        if flow.without_images is None:
            continue
        names = [f"{block}→{layer}" for block, layer in flow.knocked_out] + ["all"]
        changes = [loss - flow.loss for loss in (*flow.knocked_out.values(), flow.without_images)]
        places = range(len(labels), len(labels) + len(names))
        axes.bar(places, changes, color=f"C{number}", label=flow.name)
        labels += names
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, rotation=90 if len(labels) > 16 else 0)
    axes.set_xlabel("hidden route: encoder block → LLM layer")
    axes.set_ylabel("change of the loss, nats")
    axes.set_title("Loss without one route, and without all", fontsize=11)
    axes.legend(frameon=False)


def _line(axes: Any, flow: Flow, values: dict[int, float], colour: str) -> None:
    axes.plot(list(values), list(values.values()), color=colour, marker=".", label=flow.name)
    read = [block for block in values if flow.read_by[block]]
    ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
    axes.plot(read, [values[block] for block in read], color=colour, **ring)


def _finish_blocks(axes: Any, flows: Sequence[Flow]) -> None:
    deepest = max(len(flow.read_by) for flow in flows)
    axes.set_xlim(0.5, deepest + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("encoder block")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
