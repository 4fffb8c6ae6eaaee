"""What a run's folder says of how its model came about: recipe, licences, stages, cost, versions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hive_ds.errors import HiveError
from hive_ds.recipe import RECIPES

RESULTS = "results.json"
JUDGED = "vision_encoder_sha256"
"""Key of an evaluation's results: `weights_sha256` of the encoder."""


@dataclass(frozen=True)
class StageFacts:
    """One stage, out of its ``metrics.jsonl``. Steps that a killed run did twice count once, as in that file."""

    name: str
    steps: int
    samples: int
    devices: str
    """Ranks and device of every attempt that differs."""
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
    devices = ", ".join(dict.fromkeys(f"{event['ranks']} x {event['device']}" for event in starts))
    return StageFacts(folder.name, done, int(last["samples"]), devices, seconds / 3600, flops, last["loss"])


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


def find_scores(given: Path | None, run: Path | None, hashes: Collection[str]) -> dict[str, Any]:
    """Results by where they lie: ``given`` or, without it, every ``results.json`` of the run that judged this encoder.

    Args:
        given: a JSON file.
        run: folder of the run, if there is one; its folders and theirs are looked through.
        hashes: of the encoder, whole and cut. Results that were made with another are not its scores.

    Raises:
        HiveError: ``given`` is not there, is not JSON, or says that it judged another encoder.
    """
    if given is not None:
        results = _read_scores(given)
        judged = _judged(results)
        if judged is not None and judged not in hashes:
            raise HiveError(
                f"scores {given}: of an encoder with sha256 {judged}; expected {' or '.join(sorted(hashes))}"
            )
        return {given.name: results}
    files = sorted(file for depth in ("*", "*/*") for file in run.glob(f"{depth}/{RESULTS}")) if run is not None else []
    found = {str(file.relative_to(run)): _read_scores(file) for file in files if run is not None}
    return {name: results for name, results in found.items() if _judged(results) in hashes}


def _read_scores(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise HiveError(f"scores {file}: {error}; expected a JSON file") from error


def _judged(results: Any) -> str | None:
    """Hash of the encoder that an evaluation says it ran with."""
    return results.get(JUDGED) if isinstance(results, dict) else None
