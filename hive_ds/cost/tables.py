"""The curves of the paper's claims as Markdown tables, for the terminal and for docs/cost.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hive_ds.cost.claims import CAPTION, FLOPS, MEMORY, MICRO_BATCH, SETUPS, SPEED


def tables(curves: dict[str, Any]) -> list[str]:
    """Where each claim holds, FLOPs by text length, memory by text length, memory by batch.

    Args:
        curves: of `hive_ds.cost.claims.compare`.
    """
    return [_where_claims_hold(curves), _flops(curves["flops"]), *_memory(curves["memory"])]


def peaks(stages: Sequence[dict[str, Any]]) -> str:
    """Peak memory and HFU of two recipes, stage by stage.

    Args:
        stages: of a results file, the first recipe's before the second's at each stage.
    """
    rows = []
    for ours, theirs in zip(stages[::2], stages[1::2], strict=True):
        flops = [cost["hardware_flops"] / cost["batch"] / 1e12 for cost in (ours, theirs)]
        memory = [cost["peak"] / 1e9 for cost in (ours, theirs)]
        values = [f"{memory[0]:.2f}", f"{memory[1]:.2f}", f"{100 * (1 - memory[0] / memory[1]):.1f}"]
        rows.append([str(ours["stage"]), *values, *(f"{value:.2f}" for value in flops), f"{flops[0] / flops[1]:.3f}"])
    heads = ["stage", "GB, HIVE", "GB, SA", "% saved", "TFLOPs a sample (HFU), HIVE", "SA", "share"]
    return _table(heads, rows)


def _where_claims_hold(curves: dict[str, Any]) -> str:
    rows = []
    for stage, routes in _places(curves["holds"]):
        own = _of(curves["holds"], stage, routes)
        cells = [_up_to(_pick(own, claim=claim, encoder_counted=counted)["up_to"]) for claim, counted in _CONDITIONS]
        points = [point for point in _of(curves["memory"], stage, routes) if point["batch"] == MICRO_BATCH]
        cells += [_up_to(_longest_saving(points, setup)) for setup in SETUPS]
        rows.append([str(stage), str(routes), *cells])
    heads = [f"{FLOPS}x FLOPs, encoder counted", f"{FLOPS}x FLOPs, without it"]
    heads += [f"{SPEED}x speed (bound), encoder counted", f"{SPEED}x speed (bound), without it"]
    heads += [f"-{100 * MEMORY:.1f} % memory, {setup}" for setup in SETUPS]
    return _table(["stage", "routes", *heads], rows)


_CONDITIONS = (("flops", True), ("flops", False), ("speed", True), ("speed", False))


def _longest_saving(points: Iterable[dict[str, Any]], setup: str) -> int:
    return max((p["text_length"] for p in points if round(p["saved"][setup], 3) >= MEMORY), default=0)


def _up_to(length: int) -> str:
    return f"up to {length} tokens" if length else "never"


def _flops(points: list[dict[str, Any]]) -> str:
    lengths = sorted({point["text_length"] for point in points})
    rows = []
    for stage, routes in _places(points):
        own = _of(points, stage, routes)
        for label, key in (("counted", "ratio"), ("not counted", "ratio_without_encoder")):
            rows.append([str(stage), str(routes), label, *(f"{point[key]:.3f}" for point in own)])
    return _table(["stage", "routes", "encoder", *map(str, lengths)], rows)


def _memory(points: list[dict[str, Any]]) -> list[str]:
    by_length = [point for point in points if point["batch"] == MICRO_BATCH]
    by_batch = sorted((p for p in points if p["text_length"] == CAPTION), key=lambda point: point["batch"])
    found = []
    for kind, across in ((by_length, "text_length"), (by_batch, "batch")):
        values = sorted({point[across] for point in kind})
        rows = []
        for stage, routes in _places(kind):
            own = _of(kind, stage, routes)
            for setup in SETUPS:
                cells = [f"{100 * point['saved'][setup]:.1f}" for point in own]
                rows.append([str(stage), str(routes), setup, *cells])
        found.append(_table(["stage", "routes", "on", *map(str, values)], rows))
    return found


def _places(points: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """Stages and routes, in order of first appearance."""
    return list(dict.fromkeys((point["stage"], point["routes"]) for point in points))


def _of(points: Iterable[dict[str, Any]], stage: int, routes: int) -> list[dict[str, Any]]:
    return [point for point in points if (point["stage"], point["routes"]) == (stage, routes)]


def _pick(rows: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
