"""One HTML page of a comparison: what differs, how surely, and what each arm cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from hive_ds.ablation.contrast import Contrast, contrast
from hive_ds.ablation.gather import Gathered
from hive_ds.data.scenes import ANSWERS
from hive_ds.evaluation.probes.scene_factors import FACTORS
from hive_ds.evaluation.scoring import Z_95
from hive_ds.page import document, table
from hive_ds.plots import Interval, interval_plot

PAIRS = (("hive", "base"), ("hive", "sa"), ("hive", "last"), ("sa", "base"), ("last", "base"))
"""Arms that are compared: (arm, reference)."""
SHARES = (
    *(f"answers {kind}" for kind in (*ANSWERS, "all")),
    "answers all, pictures shuffled",
    *(f"probe {factor}" for factor in FACTORS),
    *(f"probe {factor}, best block" for factor in FACTORS),
)
JUDGED = ("answers all", *(f"probe {factor}" for factor in FACTORS))
"""Scores that arms are compared by."""


def contrasts(gathered: Gathered) -> list[Contrast]:
    """Every pair of arms that was run, by every score of `JUDGED`."""
    return [
        found
        for arm, reference in PAIRS
        if arm in gathered.scores and reference in gathered.scores
        for name in JUDGED
        if (found := contrast(gathered, name, arm, reference)) is not None
    ]


def render_page(gathered: Gathered, record: dict[str, Any], *, held_out: int) -> str:
    """The page; ``held_out`` is the number of questions that each VLM answered."""
    binomial = 100 * Z_95 * math.sqrt(0.25 / held_out)
    seeds = max((len(found) for found in gathered.scores.values()), default=0)
    sections = [
        "<h1>HIVE beside its baselines, at small scale</h1>",
        f"<p>Every arm starts from the same encoder and the same LLM and sees the same data in the same order; {seeds} "
        "seeds. The encoder that comes out is judged in a LLaVA-style model (stages 4 and 5) on held-out questions, "
        "and by linear probes on held-out pictures. Percent, mean ± standard deviation over seeds.</p>",
        table(list(_share_rows(gathered))),
        f'<p class="faint">One run answers {held_out} questions: that alone leaves up to ± {binomial:.1f} points.</p>',
        "<h2>Differences</h2>",
        "<p>Percentage points, seed by seed, with the 95 % interval of the mean. The last column is the smallest true "
        "difference that these seeds would find in four cases out of five. "
        f"Of {len(record['contrasts'])} such intervals, one in twenty leaves out zero where there is no difference at "
        "all.</p>",
        interval_plot(_intervals(record["contrasts"]), "percentage points, with 95 % intervals")
        if record["contrasts"]
        else "<p>Intervals need two seeds at least.</p>",
        table(list(_contrast_rows(record["contrasts"]))),
        "<h2>Cost of training</h2>",
        table(list(_cost_rows(gathered))),
        "<h2>Made with</h2>",
        f"<p>{escape(record['hardware'])}, {escape(record['date'])}</p>",
        f"<pre>{escape(str(record['versions']))}\n{escape(str(record['seconds_by_step']))}</pre>",
    ]
    if gathered.missing:
        sections.insert(1, f'<p class="bad">Not finished: {escape(", ".join(gathered.missing))}</p>')
    return document("HIVE beside its baselines", sections)


def _share_rows(gathered: Gathered) -> Iterator[list[str]]:
    yield ["score", *gathered.scores]
    for name in SHARES:
        cells = [gathered.cell(arm, name) for arm in gathered.scores]
        if any(cells):
            yield [name, *("" if cell is None else cell.scaled(100) for cell in cells)]


def _contrast_rows(found: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    yield ["score", "arm", "minus", "difference", "95 % interval", "differs", "could be told"]
    for one in found:
        low, high = (100 * end for end in one["interval_95"])
        difference = f"{100 * one['mean']:+.1f}"
        interval, least = f"{low:+.1f} to {high:+.1f}", f"{100 * one['detectable']:.1f}"
        verdict = "yes" if one["differs"] else "no"
        yield [one["score"], one["arm"], one["reference"], difference, interval, verdict, least]


def _intervals(found: Sequence[dict[str, Any]]) -> dict[str, list[Interval]]:
    """By score."""
    by_score: dict[str, list[Interval]] = {}
    for one in sorted(found, key=lambda one: JUDGED.index(one["score"])):
        ends = (one["interval_95"][0], one["mean"], one["interval_95"][1])
        name = f"{one['arm']} \N{MINUS SIGN} {one['reference']}"
        by_score.setdefault(one["score"], []).append(Interval(name, *(100 * end for end in ends)))
    return by_score


def _cost_rows(gathered: Gathered) -> Iterator[list[str]]:
    yield ["cost", *gathered.scores]
    for name in gathered.names:
        if name.endswith((" seconds", " TFLOPs", " GB")):
            cells = [gathered.cell(arm, name) for arm in gathered.scores]
            yield [name, *("" if cell is None else cell.scaled(1) for cell in cells)]
