"""The roofline of docs/performance.md and its table, from docs/results/roofline.json."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from hive_docs.svg import BRIDGE, FAINT, INK, LANGUAGE, LOSS, RULE, VISION, Drawing

RESULT = Path(__file__).resolve().parents[1] / "results" / "roofline.json"
ROWS = (
    ("encoder", "captions", VISION),
    ("projectors", "captions", BRIDGE),
    ("LLM", "captions", LANGUAGE),
    ("LLM", "long texts", LANGUAGE),
    ("attention of the LLM", "captions", LANGUAGE),
    ("attention of the LLM", "long texts", LANGUAGE),
    ("head and loss", "captions", LOSS),
    ("optimizer", "", INK),
)
"""Part, texts and colour of each row of the picture."""
TABLE = ((1, "captions"), (3, "captions"), (3, "long texts"))
"""Stages and texts of the table; stage 2 is like stage 1."""
LEFT, RIGHT, ROOF, FLOOR, LANES = 210.0, 840.0, 60.0, 260.0, 330.0
LOW, HIGH, SLOWEST, FASTEST = 0.2, 2000.0, 0.6e12, 1.6e15
"""Ends of the axes: FLOP a byte, FLOP/s."""


@cache
def result() -> dict[str, Any]:
    """The result file."""
    found: dict[str, Any] = json.loads(RESULT.read_text())
    return found


def _rows(stage: int, texts: str) -> list[dict[str, Any]]:
    """Of a stage on one kind of texts; without a kind, the optimizer's."""
    of_stage = [row for row in result()["rows"] if row["stage"] == stage]
    lengths = sorted({row["text_length"] for row in of_stage if "text_length" in row})
    wanted = {"captions": lengths[0], "long texts": lengths[-1], "": None}[texts]
    return [row for row in of_stage if row.get("text_length") == wanted]


def _across(intensity: float) -> float:
    return LEFT + (RIGHT - LEFT) * math.log(intensity / LOW) / math.log(HIGH / LOW)


def _up(rate: float) -> float:
    return FLOOR - (FLOOR - ROOF) * math.log(rate / SLOWEST) / math.log(FASTEST / SLOWEST)


def draw_roofline() -> str:
    """Roofs of the GPUs above, and below them where each part of stages 1 to 3 lies."""
    bottom = LANES + 44 * len(ROWS)
    drawing = Drawing(860, round(bottom) + 70, "Roofline of the parts of a training step, counted")
    drawing.text(20, 26, "What GPUs could reach at so many FLOP a byte, and how many each part of a step has", size=14)
    drawing.text(20, 44, "Counted at the paper's size and from data sheets; nothing here was measured.", colour=FAINT)
    for intensity in (1.0, 10.0, 100.0, 1000.0):
        drawing.line((_across(intensity), ROOF), (_across(intensity), bottom), colour=RULE, width=1)
        drawing.text(_across(intensity), bottom + 16, f"{intensity:,.0f}", colour=FAINT, anchor="middle", size=11)
    drawing.text(RIGHT, bottom + 34, "FLOP a byte", colour=FAINT, anchor="end", size=11)
    for rate in (1e12, 1e13, 1e14, 1e15):
        drawing.line((LEFT, _up(rate)), (RIGHT, _up(rate)), colour=RULE, width=1)
        drawing.text(LEFT - 8, _up(rate) + 4, f"{rate / 1e12:,.0f} TFLOP/s", colour=FAINT, anchor="end", size=11)
    for (name, gpu), colour in zip(result()["per_second"].items(), (INK, FAINT), strict=True):
        _draw_roof(drawing, name.upper(), gpu, colour, bottom)
    for place, (part, texts, colour) in enumerate(ROWS):
        _draw_row(drawing, LANES + 44 * place, part, texts, colour)
    drawing.dot(LEFT, bottom + 48, 4.5, INK)
    drawing.text(LEFT + 10, bottom + 52, "every operator by itself", size=11)
    drawing.dot(LEFT + 170, bottom + 48, 4.5, INK, hollow=True)
    drawing.text(
        LEFT + 180,
        bottom + 52,
        "all but products and attention fused into them; lines from above: stages 1, 2, 3",
        size=11,
    )
    return drawing.render()


def _draw_roof(drawing: Drawing, name: str, gpu: dict[str, float], colour: str, bottom: float) -> None:
    ridge = gpu["flops"] / gpu["bytes"]
    begin = max(LOW, SLOWEST / gpu["bytes"])
    corner = (_across(ridge), _up(gpu["flops"]))
    drawing.line((_across(begin), _up(begin * gpu["bytes"])), corner, (RIGHT, corner[1]), colour=colour, width=2)
    drawing.line(corner, (corner[0], bottom), colour=colour, width=1)
    left = colour == INK  # of two roofs the higher one's name stands on the left
    drawing.text(corner[0] + (-6 if left else 6), LANES - 30, name, colour=colour, anchor="end" if left else "start")
    if left:
        drawing.text(corner[0] - 6, LANES - 46, "memory limits", colour=FAINT, anchor="end", size=11)
    else:
        drawing.text(corner[0] + 6, LANES - 46, "products limit", colour=FAINT, size=11)


def _draw_row(drawing: Drawing, y: float, part: str, texts: str, colour: str) -> None:
    drawing.text(20, y + 12, part)
    if texts:
        batch = _rows(1, texts)[0]["text_length"]
        drawing.text(20, y + 26, f"{texts}, {batch} tokens", colour=FAINT, size=10)
    for stage in (1, 2, 3):
        (row,) = [row for row in _rows(stage, texts) if row["part"] == part]
        lane = y + 10 * (stage - 1)
        alone, fused = (_across(row["flops"] / row[name]) for name in ("bytes", "fused"))
        drawing.line((alone, lane), (fused, lane), colour=colour, width=2)
        drawing.dot(fused, lane, 3.5, colour, hollow=True)
        if fused > alone:
            drawing.dot(alone, lane, 3.5, colour)


def table() -> list[str]:
    """Lines of the table: FLOP a byte, and milliseconds at least on the first GPU."""
    lines = [
        "| stage, texts | part | FLOP a byte | fused | ms products | ms memory | ms memory, fused | limited by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage, texts in TABLE:
        rows = [*_rows(stage, texts), *(_rows(stage, "") if texts == "captions" else [])]
        for row in rows:
            name = f"{stage}, {texts}: {row['batch']} x {row['text_length']}" if row is rows[0] else ""
            lines.append(f"| {name} | {row['part']} | {_cells(row)} |")
    return lines


def _cells(row: dict[str, Any]) -> str:
    floor = row["milliseconds_at_least"]["h200"]
    alone, fused, products = floor["memory"], floor["memory_fused"], floor["products"]
    limit = "products" if products > alone else "memory" if products < fused else "memory, until fused"
    numbers = (row["flops"] / row["bytes"], row["flops"] / row["fused"], products, alone, fused)
    return " | ".join([*(f"{number:.3g}" for number in numbers), limit])
