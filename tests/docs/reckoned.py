"""Figures that follow from data in the repository."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import quantiles

from hive_ds.data.images import MAX_RATIO
from hive_ds.launch.hosts import DISK, GIGABYTE

ROOT = Path(__file__).resolve().parents[2]

LIMITS = (
    ("docs/cluster.md", r"the disk of `--folder` \((\d+) GB free\)", (DISK / GIGABYTE,)),
    ("docs/data.md", r"over 16,384 pixels, strips longer than (\d+) times", (MAX_RATIO,)),
    ("docs/troubleshooting.md", r"sides over 16,384 pixels or (\d+) times", (MAX_RATIO,)),
    # Weights; what trains, in fp32 with its gradient and AdamW's two; a bucket.
    ("docs/performance.md", r"holds some (\d) GB in stage 3", (round(2 * 0.947 + 16 * 0.347 + 1),)),
)
"""Figures that the code sets, or that follow from it: page, words around them, values."""


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
