"""What a run's folder says of how its model came about: recipe, licences, stages, cost, versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hive_ds.errors import HiveError
from hive_ds.recipe import RECIPES


@dataclass(frozen=True)
class StageFacts:
    """One stage, out of its ``metrics.jsonl``. Steps that a killed run did twice count once, as in that file."""

    name: str
    steps: int
    samples: int
    device: str
    ranks: int
    hours: float
    """Of training steps on all ranks together: device-hours, without loading, validation and checkpoints."""
    flops: float
    """Model FLOPs of those steps."""
    loss: float | None
    """Of the last line."""


def read_stage(folder: Path) -> StageFacts | None:
    """What the stage in ``folder`` cost; None where it left no metrics."""
    events = list(_events(folder / "metrics.jsonl"))
    starts = [event for event in events if event["event"] == "start"]
    lines = [event for event in events if event["event"] == "train"]
    if not starts or not lines:
        return None
    seconds, flops, done, start = 0.0, 0.0, 0, starts[0]
    for event in events:
        if event["event"] == "start":
            start = event
        elif event["event"] == "train":
            spent = (event["step"] - done) * event["seconds_per_step"] * start["ranks"]
            seconds, done = seconds + spent, event["step"]
            flops += spent * event["mfu"] * start["matmul_flops_per_second"]
    last = lines[-1]
    return StageFacts(
        folder.name, done, int(last["samples"]), start["device"], start["ranks"], seconds / 3600, flops, last["loss"]
    )


def _events(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; one that a kill cut short is left out."""
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def training_versions(stage: Path) -> dict[str, Any]:
    """Versions that a stage ran with, out of its newest checkpoint; empty where none is kept."""
    states = sorted(stage.glob("checkpoints/step-*/state.json"))
    origin = json.loads(states[-1].read_text()).get("origin", {}) if states else {}
    return {key.removeprefix("version."): value for key, value in origin.items() if key.startswith("version.")}


def licences(recipe_name: str) -> list[str]:
    """What the package's recipe of that name, and those that it is based on, say of licences; empty for other recipes.

    A run's own ``recipe.yaml`` holds values alone: the words are comments of the file that it was made from.
    """
    file = RECIPES / f"{recipe_name}.yaml"
    if not file.is_file():
        return []
    text = file.read_text()
    base = yaml.safe_load(text).get("base")
    return [*_licence_block(text), *(licences(base) if isinstance(base, str) else [])]


def _licence_block(text: str) -> list[str]:
    """The comment that starts with ``# Licences``, up to an empty comment line or the first value."""
    block: list[str] = []
    for line in text.splitlines():
        if line.startswith("# Licences") or (block and line.startswith("# ")):
            block.append(line.removeprefix("# "))
        elif block:
            break
    return block


def read_scores(file: Path) -> Any:
    """Results of an evaluation.

    Raises:
        HiveError: the file is not there or is not JSON.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise HiveError(f"scores {file}: {error}; expected a JSON file") from error
