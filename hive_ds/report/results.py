"""Results in a run's folder: benchmarks, probes, questions, scores; and pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from hive_ds.evaluation.scoring import accuracy_by_kind, is_part
from hive_ds.page import picture
from hive_ds.report.run import RunRecord, read_json
from hive_ds.report.tables import Rows

BENCHMARKS, PROBES, ANSWERS, SCORES = "results.json", "probes.json", "answers.json", "scores.json"
MOST_PICTURES = 24
"""Of a run: the page holds them whole."""
LONGEST_SIDE = 1200
"""Pixels; larger pictures are made smaller."""


def benchmark_rows(runs: Sequence[RunRecord]) -> Rows:
    """Main scores of every ``results.json`` of ``hive-ds eval`` up to two folders down."""
    rows = [
        [run.name, where, name, score["name"], f"{score['value']:.4g}", f"{score['maximum']:g}", str(found["samples"])]
        for run in runs
        for where, content in _below(run.folder, BENCHMARKS)
        for name, found in content.get("benchmarks", {}).items()
        for score in found["scores"]
        if not is_part(score["name"])
    ]
    return [["run", "in", "benchmark", "score", "value", "of", "questions"], *rows] if rows else []


def probe_rows(runs: Sequence[RunRecord]) -> Rows:
    """The best block of each encoder and task, out of every ``probes.json``."""
    rows = []
    for run in runs:
        for where, content in _below(run.folder, PROBES):
            for best in content.get("best", ()):
                spread = "" if best.get("std") is None else f" ± {100 * best['std']:.1f}"
                score = f"{100 * best['accuracy']:.1f} %{spread}"
                head = content["head"]["name"]
                rows.append([run.name, where, best["encoder"], best["task"], head, str(best["block"]), score])
    return [["run", "in", "encoder", "task", "head", "best block", "accuracy"], *rows] if rows else []


def answer_rows(runs: Sequence[RunRecord]) -> Rows:
    """Held-out questions by kind, with the right picture and with another one, as the quickstart asks them."""
    rows = []
    for run in runs:
        found = read_json(run.folder / ANSWERS)
        if not isinstance(found, dict) or not {"kinds", "answers", "shuffled_answers", "truths"} <= set(found):
            continue
        right = accuracy_by_kind(found["kinds"], found["answers"], found["truths"])
        shuffled = accuracy_by_kind(found["kinds"], found["shuffled_answers"], found["truths"])
        for kind, share in right.items():
            low, high = (f"{100 * end:.0f}" for end in share.interval)
            values = [f"{100 * share.value:.0f} %", f"{low} to {high}", f"{100 * shuffled[kind].value:.0f} %"]
            rows.append([run.name, kind, *values, str(share.total)])
    return [["run", "kind", "right", "95 % interval", "pictures shuffled", "questions"], *rows] if rows else []


def score_rows(runs: Sequence[RunRecord]) -> Rows:
    """Numbers of ``RUN/scores.json``, which an ablation or a comparison writes."""
    found = [read_json(run.folder / SCORES) for run in runs]
    numbers = [
        {name: value for name, value in one.items() if isinstance(value, (int, float))} if isinstance(one, dict) else {}
        for one in found
    ]
    names = dict.fromkeys(name for one in numbers for name in one)
    rows = [[name, *(f"{one[name]:.4g}" if name in one else "" for one in numbers)] for name in names]
    return [["score", *(run.name for run in runs)], *rows] if rows else []


def _below(run: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects of that name up to two folders down, by folder."""
    for depth in ("", "*/", "*/*/"):
        for file in sorted(run.glob(f"{depth}{name}")):
            if isinstance(content := read_json(file), dict):
                yield str(file.parent.relative_to(run)), content


def pictures(run: RunRecord) -> str:
    """The run's maps as figures, those of its end where there are many; nothing where there are none."""
    files = [file for folder in ("maps", "stage*/maps") for file in sorted(run.folder.glob(f"{folder}/**/*.png"))]
    figures = [figure for file in files[-MOST_PICTURES:] if (figure := _figure(run, file))]
    if not figures:
        return ""
    left_out = len(files) - len(figures)
    note = f'<p class="faint">The last {len(figures)} of {len(files)} pictures.</p>' if left_out else ""
    return f'{note}<div class="maps">{"".join(figures)}</div>'


def _figure(run: RunRecord, file: Path) -> str | None:
    try:
        with Image.open(file) as image:
            image.load()
            small: Image.Image = image
            if max(image.size) > LONGEST_SIDE:
                small = image.convert("RGB")
                small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            target = io.BytesIO()
            small.save(target, "png", optimize=True)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None  # half written, or no picture
    parts = file.relative_to(run.folder).with_suffix("").parts
    caption = ", ".join(part.replace("_", " ") for part in parts if part != "maps")
    return f"<figure>{picture(target.getvalue(), 'png', caption)}<figcaption>{escape(caption)}</figcaption></figure>"
