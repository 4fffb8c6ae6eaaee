"""Figures that follow from data in the repository."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import quantiles

ROOT = Path(__file__).resolve().parents[2]


def caption_figures(kind: str) -> tuple[float, ...]:
    """How many, least, most and quartiles of the measured lengths of captions."""
    file = ROOT / "hive_ds" / "benchmarks" / "caption_lengths.json"
    lengths = json.loads(file.read_text())["kinds"][kind]["lengths"]
    return len(lengths), min(lengths), max(lengths), *quantiles(lengths, n=4, method="inclusive")


def encoder_share(stage: int) -> float:
    """Percent of the FLOPs of a micro-batch of captions that are the encoder's."""
    rows = json.loads((ROOT / "docs/results/roofline.json").read_text())["rows"]
    flops = {row["part"]: row["flops"] for row in rows if (row["stage"], row.get("text_length")) == (stage, 64)}
    return 100 * flops["encoder"] / sum(flops.values())
