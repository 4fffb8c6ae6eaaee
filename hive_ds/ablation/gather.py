"""What came of an ablation: one column an arm, mean and standard deviation over its seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from hive_ds.ablation.plan import ArmRun, read_plan
from hive_ds.errors import told_as
from hive_ds.evaluation.scoring import is_part
from hive_ds.events import read_events
from hive_ds.export.run_facts import read_stage
from hive_ds.files import write_whole

SCORES = "scores.json"
"""In a run's folder: any further scores of it, name -> number."""
BENCHMARKS = Path("eval") / "results.json"
"""In a run's folder: what ``hive-ds eval RUN --out RUN/eval`` wrote."""


@dataclass(frozen=True)
class Cell:
    """A score of one arm over its seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation over seeds (n - 1); nan of a single one."""
        return stdev(self.values) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        """Mean ± standard deviation."""
        return f"{self.mean:.4g}" + ("" if math.isnan(self.std) else f" ± {self.std:.2g}")

    def scaled(self, factor: float) -> str:
        """The same, times ``factor``, with one digit behind the point."""
        spread = "" if math.isnan(self.std) else f" ± {factor * self.std:.1f}"
        return f"{factor * self.mean:.1f}{spread}"


@dataclass(frozen=True)
class Gathered:
    """All scores of an ablation."""

    scores: dict[str, dict[int, dict[str, float]]]
    """Arm -> seed -> score name -> value."""
    missing: tuple[str, ...]
    """Runs that are not finished."""

    @property
    def names(self) -> list[str]:
        """Every score that some run has, in order of first appearance."""
        found = (name for seeds in self.scores.values() for scores in seeds.values() for name in scores)
        return list(dict.fromkeys(found))

    def cell(self, arm: str, name: str) -> Cell | None:
        """A score of an arm; None where no seed has it."""
        values = tuple(scores[name] for scores in self.scores[arm].values() if name in scores)
        return Cell(values) if values else None

    def table(self) -> list[list[str]]:
        """Heading with the arms and how many seeds each has, then a row a score."""
        rows = [["score", *(f"{arm} ({len(seeds)})" for arm, seeds in self.scores.items())]]
        for name in self.names:
            cells = [self.cell(arm, name) for arm in self.scores]
            rows.append([name, *("" if cell is None else str(cell) for cell in cells)])
        return rows

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every seed's value, and mean and standard deviation."""
        summary = {
            arm: {
                name: {"mean": cell.mean, "std": None if math.isnan(cell.std) else cell.std, "seeds": len(cell.values)}
                for name in self.names
                if (cell := self.cell(arm, name)) is not None
            }
            for arm in self.scores
        }
        return {"summary": summary, "scores": self.scores, "missing": list(self.missing)}


def gather(runs: Sequence[ArmRun]) -> Gathered:
    """Read the scores and the cost of all runs; runs that are not finished are named and left out."""
    scores: dict[str, dict[int, dict[str, float]]] = {run.arm: {} for run in runs}
    missing = []
    for run in runs:
        if all(run.done(stage) for stage in run.stages):
            scores[run.arm][run.seed] = dict(_scores(run))
        else:
            missing.append(run.name)
    return Gathered(scores, tuple(missing))


def print_table(out: Path) -> None:
    """Print the scores of the ablation in ``out``, and write them to ``out/table.json``."""
    gathered = gather(read_plan(out))
    write_whole(out / "table.json", json.dumps(gathered.as_dict(), indent=1) + "\n")
    head, *body = gathered.table()
    table = Table(*head, title="mean ± standard deviation over (seeds)")
    for row in body:
        table.add_row(*row)
    Console().print(table)
    if gathered.missing:
        print(f"not finished, and left out: {', '.join(gathered.missing)}")


def _scores(run: ArmRun) -> Iterator[tuple[str, float]]:
    for stage in run.stages:
        lines = read_events(run.folder / f"stage{stage}" / "metrics.jsonl")
        yield from _losses(stage, lines)
        facts = read_stage(run.folder / f"stage{stage}")
        if facts is not None:  # of training steps, without validation and saving
            yield f"stage {stage} seconds", facts.seconds
            yield f"stage {stage} TFLOPs", facts.flops / 1e12
            yield f"stage {stage} GB", facts.memory_gb or 0.0
    if (run.folder / BENCHMARKS).is_file():
        with told_as(str(run.folder / BENCHMARKS), "what hive-ds eval writes"):
            yield from _benchmarks(json.loads((run.folder / BENCHMARKS).read_text())["benchmarks"])
    if (run.folder / SCORES).is_file():
        with told_as(str(run.folder / SCORES), "an object of names and numbers"):
            found = json.loads((run.folder / SCORES).read_text())
            yield from [(name, float(value)) for name, value in found.items()]


def _benchmarks(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, entry in found.items():
        asked = "" if entry["samples"] == entry["available"] else f" of the first {entry['samples']}"
        main = [score for score in entry["scores"] if not is_part(score["name"])]
        yield from ((f"{name} {score['name']}{asked}", float(score["value"])) for score in main)


def _losses(stage: int, lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """The last validation losses of a stage."""
    last = [line for line in lines if line["event"] == "validation"][-1:]
    for line in last:
        for name in ("loss", "text_loss"):
            if line.get(name) is not None:
                yield f"stage {stage} {name}", line[name]
