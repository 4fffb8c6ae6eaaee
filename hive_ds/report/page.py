"""The page: HTML with everything inside, for one run or for several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml

from hive_ds.errors import told_as
from hive_ds.files import must_write, write_whole
from hive_ds.page import document, table
from hive_ds.report.attempts import attempt_rows, warnings
from hive_ds.report.curves import SMOOTH_SHARE, stage_curves
from hive_ds.report.results import answer_rows, benchmark_rows, pictures, probe_rows, score_rows
from hive_ds.report.run import RunRecord, read_runs
from hive_ds.report.tables import (
    Rows,
    cost_rows,
    difference_rows,
    recipe_rows,
    stage_rows,
    validation_rows,
    version_rows,
)

STYLE = """
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; border-bottom: 1px solid var(--rule); padding-bottom: .6rem; }
nav a, a { color: var(--one); } h3 { margin: 1.4rem 0 .6rem; font-size: 1rem; } h1, li, p { overflow-wrap: anywhere; }
.warnings { border-left: 4px solid var(--two); padding-left: 1.6rem; } .warnings li { margin: .2rem 0; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
.maps img { image-rendering: auto; } summary { cursor: pointer; }
"""


def write_report(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page of the runs in ``folders`` to ``out`` or, of one run, to RUN/report.html; returns where.

    Raises:
        HiveError: a folder is no run, or the page cannot be written.
    """
    runs = read_runs(folders)
    page = out or (folders[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    with told_as(f"report of {', '.join(map(str, folders))}", "folders as training leaves them"):
        text = render_report(runs)
    with must_write(page, "name another with --out"):
        write_whole(page, text)
    return page


def render_report(runs: Sequence[RunRecord]) -> str:
    """The page as HTML."""
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    parts = [
        ("state", "State", _progress(runs)),
        ("warnings", "Warnings", _warnings(runs)),
        ("recipe", "Recipe", _recipes(runs)),
        ("curves", "Curves", _curves(runs)),
        ("results", "Results", _results(runs)),
        ("maps", "Maps", _maps(runs)),
        ("cost", "Cost", _cost(runs)),
        ("environment", "Environment", _environment(runs)),
    ]
    shown = [(key, heading, content) for key, heading, content in parts if content]
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in shown)
    sections = [f"<h1>{escape(title)}</h1>", f"<nav>{links}</nav>"]
    sections += [f'<h2 id="{key}">{heading}</h2>\n{content}' for key, heading, content in shown]
    return document(title, sections, STYLE)


def _progress(runs: Sequence[RunRecord]) -> str:
    numbers = sorted({stage.number for run in runs for stage in run.stages})
    rows = [["run", *(f"stage {number}" for number in numbers)]]
    for run in runs:
        found = [run.stage(number) for number in numbers]
        rows.append([run.name, *("" if stage is None else stage.progress for stage in found)])
    return table(rows)


def _warnings(runs: Sequence[RunRecord]) -> str:
    found = warnings(runs)
    if not found:
        return "<p>None: no skipped step, unreadable sample, failed checkpoint, slow rank or hang was recorded.</p>"
    return '<ul class="warnings">' + "".join(f"<li>{escape(said)}</li>" for said in found) + "</ul>"


def _recipes(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        rows = difference_rows(runs)
        same = "<p>The recipes have the same values.</p>"
        parts = ["<h3>What differs</h3>", table(rows) if rows else same]
        return "\n".join([*parts, *(_whole_recipe(run) for run in runs)])
    (run,) = runs
    values = "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in recipe_rows(run))
    if not values:
        return "<p>No recipe.yaml could be read.</p>"
    return f"<dl>{values}</dl>\n{_titled('Numbers of the stages', stage_rows(run))}\n{_whole_recipe(run)}"


def _whole_recipe(run: RunRecord) -> str:
    text = escape(yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True))
    return f"<details><summary>Every value of {escape(run.name)}</summary><pre>{text}</pre></details>"


def _curves(runs: Sequence[RunRecord]) -> str:
    titles = {stage.number: stage.title for run in runs for stage in run.stages}
    parts = [
        '<p class="faint">Over optimizer steps; steps that an attempt did again are drawn once. The training loss is a '
        f"running mean over 1/{SMOOTH_SHARE} of its points; of long runs each plot keeps the highest and lowest value "
        "of every stretch.</p>"
    ]
    for number, title in sorted(titles.items()):
        parts.append(f"<h3>{escape(title)}</h3>\n{stage_curves(runs, number)}")
    return "\n".join(parts)


def _results(runs: Sequence[RunRecord]) -> str:
    parts = [
        _titled("Held-out loss, nats per token", validation_rows(runs)),
        _titled("Benchmarks", benchmark_rows(runs)),
        _titled("Probes", probe_rows(runs)),
        _titled("Held-out questions", answer_rows(runs)),
        _titled("Scores", score_rows(runs)),
    ]
    return "\n".join(part for part in parts if part) or "<p>The run holds no validation, benchmark or probe yet.</p>"


def _maps(runs: Sequence[RunRecord]) -> str:
    found = [(run, shown) for run in runs if (shown := pictures(run))]
    if len(runs) == 1:
        return found[0][1] if found else ""
    return "\n".join(f"<h3>{escape(run.name)}</h3>\n{shown}" for run, shown in found)


def _cost(runs: Sequence[RunRecord]) -> str:
    rows = cost_rows(runs)
    note = (
        '<p class="faint">Of training steps, without loading, validation, checkpoints, and steps lost to a failure. '
        "Memory is the peak of rank 0: allocated on its GPU, or resident on a CPU.</p>"
    )
    return table(rows) + note if rows else ""


def _environment(runs: Sequence[RunRecord]) -> str:
    return _titled("Attempts", attempt_rows(runs)) + _titled("Versions", version_rows(runs))


def _titled(title: str, rows: Rows) -> str:
    return f"<h3>{escape(title)}</h3>\n{table(rows)}" if rows else ""
