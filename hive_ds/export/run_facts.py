"""What a run's folder says of how its model came about: recipe, licences, stages, cost, versions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hive_ds.errors import HiveError, told_as
from hive_ds.events import of_kind, read_events
from hive_ds.recipe import RECIPES

RESULTS = "results.json"
JUDGED_ENCODER, JUDGED_MODEL = "vision_encoder_sha256", "weights_sha256"
"""Keys of an evaluation's results: `weights_sha256` of the encoder, and `model_sha256`."""


@dataclass(frozen=True)
class StageFacts:
    """One stage, out of its ``metrics.jsonl``. Steps that a killed run did twice count once, as in that file."""

    name: str
    steps: int
    samples: int
    devices: str
    """Ranks and device of every attempt that differs."""
    seconds: float
    """Of training steps, by the clock."""
    hours: float
    """Of training steps on all ranks together: device-hours, without loading, validation and checkpoints."""
    flops: float
    """Model FLOPs of those steps."""
    mfu: float
    """Those FLOPs over what the devices' measured matrix-product rate would have allowed."""
    memory_gb: float | None
    """Peak of rank 0: allocated on its GPU, or resident on a CPU."""
    loss: float | None
    """Of the last line."""


def read_stage(folder: Path) -> StageFacts | None:
    """What the stage in ``folder`` cost; None where it left no metrics."""
    with _lines_of(folder) as events:
        return _facts(folder.name, events)


@contextmanager
def _lines_of(stage: Path) -> Iterator[list[dict[str, Any]]]:
    """The lines of its ``metrics.jsonl``; inside, one that lacks something is an error that names the file."""
    file = stage / "metrics.jsonl"
    with told_as(str(file), "lines that training writes"):
        yield read_events(file)


def _facts(name: str, events: Sequence[Mapping[str, Any]]) -> StageFacts | None:
    starts, lines = of_kind(events, "start"), of_kind(events, "train")
    if not starts or not lines:
        return None
    clock, seconds, flops, possible, done, start = 0.0, 0.0, 0.0, 0.0, 0, starts[0]
    for event in events:
        if event["event"] == "start":
            start = event
        elif event["event"] == "train":
            passed = (event["step"] - done) * event["seconds_per_step"]
            spent = passed * start["ranks"]
            clock, seconds, done = clock + passed, seconds + spent, event["step"]
            flops += spent * event["mfu"] * start["matmul_flops_per_second"]
            possible += spent * start["matmul_flops_per_second"]
    last = lines[-1]
    return StageFacts(
        name=name,
        steps=done,
        samples=int(last["samples"]),
        devices=", ".join(dict.fromkeys(f"{event['ranks']} x {event['device']}" for event in starts)),
        seconds=clock,
        hours=seconds / 3600,
        flops=flops,
        mfu=flops / possible if possible else 0.0,
        memory_gb=max((event["memory_gb"] for event in lines if "memory_gb" in event), default=None),
        loss=last["loss"],
    )


def training_versions(stage: Path) -> dict[str, Any]:
    """Versions that the last attempt at a stage ran with; empty where it left no metrics."""
    with _lines_of(stage) as events:
        starts = of_kind(events, "start")
        return dict(starts[-1]["versions"]) if starts else {}


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


def find_scores(given: Path | None, run: Path | None, key: str, hashes: Collection[str]) -> dict[str, Any]:
    """Results by where they lie: ``given`` or, without it, every ``results.json`` of the run that judged these weights.

    Args:
        given: a JSON file.
        run: folder of the run, if there is one; its folders and theirs are looked through.
        key: of the results' hash that counts.
        hashes: that may stand there. Results that were made with other weights are not their scores.

    Raises:
        HiveError: ``given`` is not there, is not JSON, or says that it judged other weights.
    """
    if given is not None:
        results = _read_scores(given)
        judged = _judged(results, key)
        if judged is not None and judged not in hashes:
            raise HiveError(f"scores {given}: its {key} is {judged}; expected {' or '.join(sorted(hashes))}")
        return {given.name: results}
    files = sorted(file for depth in ("*", "*/*") for file in run.glob(f"{depth}/{RESULTS}")) if run is not None else []
    found = {str(file.relative_to(run)): _read_scores(file) for file in files if run is not None}
    return {name: results for name, results in found.items() if _judged(results, key) in hashes}


def _read_scores(file: Path) -> Any:
    with told_as(f"scores {file}", "a JSON file"):
        return json.loads(file.read_text())


def _judged(results: Any, key: str) -> str | None:
    """Hash of the weights that an evaluation says it ran with."""
    return str(results[key]) if isinstance(results, dict) and results.get(key) is not None else None
