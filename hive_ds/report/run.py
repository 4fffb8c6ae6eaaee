"""A run as its folder tells it: stages with their events and recipes, any of which may be missing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hive_ds.errors import HiveError
from hive_ds.events import of_kind, read_events
from hive_ds.export.run_facts import StageFacts, read_stage
from hive_ds.stages import STAGES
from hive_ds.training.origin import flatten

STAGE_NAMES = {stage.number: stage.name for stage in STAGES}


@dataclass(frozen=True)
class StageRecord:
    """``RUN/stageN``."""

    folder: Path
    number: int
    events: Sequence[Mapping[str, Any]]
    """Of its metrics.jsonl; those of steps that were done again are gone."""
    recipe: dict[str, Any]
    """Its recipe.yaml; empty where there is none."""
    done: bool
    facts: StageFacts | None
    """What it cost; None where nothing was logged."""

    @classmethod
    def read(cls, folder: Path) -> StageRecord:
        """What there is in ``folder``.

        Raises:
            HiveError: a line of its metrics lacks something.
        """
        number = int(folder.name.removeprefix("stage"))
        events = read_events(folder / "metrics.jsonl")
        recipe, done = _read_yaml(folder / "recipe.yaml"), (folder / "DONE").is_file()
        return cls(folder, number, events, recipe, done, read_stage(folder))

    @property
    def title(self) -> str:
        """Its number and name."""
        return f"Stage {self.number}: {STAGE_NAMES.get(self.number, 'of another version').replace('_', ' ')}"

    @property
    def last(self) -> Mapping[str, Any]:
        """Its last ``train`` line, or nothing."""
        lines = of_kind(self.events, "train")
        return lines[-1] if lines else {}

    @property
    def progress(self) -> str:
        """How far it came."""
        step = self.last.get("step", 0)
        if self.done:
            return f"done, {step} steps"
        if not self.last:
            return "begun, nothing logged yet" if self.events else "nothing logged"
        left = round(self.last["eta_seconds"] / self.last["seconds_per_step"]) if self.last["seconds_per_step"] else 0
        return f"not done: step {step} of {step + left}"


@dataclass(frozen=True)
class RunRecord:
    """A run's folder."""

    folder: Path
    name: str
    """On the page; no other run there has it."""
    stages: Sequence[StageRecord]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Of its last stage that has one."""
        return next((stage.recipe for stage in reversed(self.stages) if stage.recipe), {})

    @cached_property
    def flat_recipe(self) -> dict[str, Any]:
        """The recipe's values by dotted key; what a stage was given comes from that stage's own file."""
        flat = flatten("recipe", self.recipe)
        for stage in self.stages:
            own = f"recipe.stages.{STAGE_NAMES.get(stage.number)}"
            flat |= {key: value for key, value in flatten("recipe", stage.recipe).items() if key.startswith(f"{own}.")}
        return {key.removeprefix("recipe."): value for key, value in flat.items()}

    def stage(self, number: int) -> StageRecord | None:
        """A stage by number, where the run has it."""
        return next((stage for stage in self.stages if stage.number == number), None)


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in ``folders``, under the shortest names that tell them apart.

    Raises:
        HiveError: a folder that is no run, or one that is given twice.
    """
    resolved = [Path(os.path.realpath(folder)) for folder in folders]  # `resolve` raises at links that lead in a circle
    twice = next((folder for folder in resolved if resolved.count(folder) > 1), None)
    if twice is not None:
        raise HiveError(f"run {twice}: given twice; name each run once")
    parts = 1
    while len({path.parts[-parts:] for path in resolved}) < len(resolved):
        parts += 1
    names = ["/".join(path.parts[-parts:]) for path in resolved]
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> RunRecord:
    if not folder.is_dir():
        raise HiveError(f"run {folder}: no such folder; expected the folder of a run (--run of the training command)")
    stages = [StageRecord.read(path) for path in _stage_folders(folder)]
    if not stages:
        inside = sorted(str(path) for path in folder.iterdir() if path.is_dir() and _stage_folders(path))
        hint = (
            f"; it holds runs, name those: {' '.join(inside[:4])}{' ...' if len(inside) > 4 else ''}" if inside else ""
        )
        raise HiveError(f"run {folder}: holds no stage folder with metrics.jsonl or recipe.yaml (stage1, ...){hint}")
    return RunRecord(folder, name, stages)


def _stage_folders(run: Path) -> list[Path]:
    found = [path for path in run.glob("stage*") if re.fullmatch(r"stage\d+", path.name)]
    known = [path for path in found if (path / "metrics.jsonl").is_file() or (path / "recipe.yaml").is_file()]
    return sorted(known, key=lambda path: int(path.name.removeprefix("stage")))


def read_json(file: Path) -> Any:
    """A JSON file's content; None where it is missing or no JSON."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
