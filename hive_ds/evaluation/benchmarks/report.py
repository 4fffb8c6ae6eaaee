"""What an evaluation leaves behind: scores with all that decides about them, answers, task files and a table."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hive_ds import __version__
from hive_ds.errors import HiveError, told_as
from hive_ds.evaluation.benchmarks.catalogue import write_task
from hive_ds.evaluation.benchmarks.checkpoint_model import CheckpointModel
from hive_ds.evaluation.benchmarks.local_data import describe_files
from hive_ds.evaluation.benchmarks.runner import Outcome
from hive_ds.evaluation.benchmarks.self_test import SelfTest
from hive_ds.evaluation.checkpoints import tower_sha256
from hive_ds.evaluation.scoring import is_part
from hive_ds.files import must_write, write_whole
from hive_ds.model.identity import model_sha256

RESULTS = "results.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "lmms-eval", "accelerate", "pillow", "numpy")


def checkpoint_record(checkpoint: Path, model: CheckpointModel, encoder: Path | None) -> dict[str, Any]:
    """What was evaluated, and how it ran.

    Raises:
        HiveError: the checkpoint's vision encoder is not that of the folder ``encoder``.
    """
    return {
        "checkpoint": str(checkpoint),
        "model_class": type(model.model).__name__,
        "weights_sha256": model_sha256(model.model),
        "vision_encoder_sha256": tower_sha256(model.model, encoder),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "ranks": model.world_size,
        "batch_size": model.batch_size,
        "versions": {"hive-ds": __version__, **{name: version(name) for name in LIBRARIES}},
    }


def prepare_folder(out: Path, names: Collection[str]) -> None:
    """Make the folders of results before hours are spent on what they are to hold.

    Raises:
        HiveError: they cannot be made or written to, or hold scores of other benchmarks, which would be lost.
    """
    with must_write(out, "expected a folder for results (--out)"):
        for folder in (out / "tasks", out / "answers"):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    earlier: set[str] = set()
    if (out / RESULTS).is_file():
        with told_as(str(out / RESULTS), "results of an earlier evaluation, or another folder"):
            earlier = set(json.loads((out / RESULTS).read_text())["benchmarks"])
    if lost := sorted(earlier - set(names)):
        raise HiveError(
            f"--out {out}: holds scores of {', '.join(lost)}, which this evaluation would drop; expected another "
            "folder, or these benchmarks too"
        )


def write_results(
    out: Path,
    outcomes: Sequence[Outcome],
    configs: dict[str, dict[str, Any]],
    record: dict[str, Any],
    self_tests: Sequence[SelfTest] | None,
) -> None:
    """Write ``tasks/``, ``answers/``, ``scores.md``, ``scores.json`` and last ``results.json`` to ``out``.

    `prepare_folder` has made the folders.
    """
    benchmarks = {}
    for outcome in outcomes:
        name, config = outcome.benchmark.name, configs[outcome.benchmark.name]
        write_task(config, out / "tasks" / f"{name}.yaml")
        lines = [json.dumps({**_plain(row.labels), "reply": row.answer}) for row in outcome.rows]
        write_whole(out / "answers" / f"{name}.jsonl", "\n".join(lines) + "\n")
        benchmarks[name] = {
            "task": outcome.benchmark.task,
            "prompt_version": outcome.prompt_version,
            "split": outcome.split,
            "samples": len(outcome.rows),
            "available": outcome.available,
            "data": describe_files(config),
            "scores": [score.as_dict() for score in outcome.scores],
            "lmms_eval": outcome.lmms_eval,
            "task_config": config,
        }
    write_whole(out / "scores.md", table(outcomes))
    write_whole(out / "scores.json", json.dumps(summary(outcomes, record), indent=1) + "\n")
    tests = None if self_tests is None else [asdict(test) for test in self_tests]
    results = {**record, "self_tests": tests, "benchmarks": benchmarks}
    write_whole(out / RESULTS, json.dumps(results, indent=1) + "\n")


def summary(outcomes: Sequence[Outcome], record: dict[str, Any]) -> dict[str, Any]:
    """The main scores, with what tells whose they are and how they were asked for."""
    return {
        "weights_sha256": record["weights_sha256"],
        "vision_encoder_sha256": record["vision_encoder_sha256"],
        "lmms-eval": record["versions"]["lmms-eval"],
        "scores": {
            f"{outcome.prompt_version} ({outcome.benchmark.name}, {outcome.split}, {len(outcome.rows)} questions)": {
                score.name: score.value for score in outcome.scores if not is_part(score.name)
            }
            for outcome in outcomes
        },
    }


def table(outcomes: Sequence[Outcome]) -> str:
    """The main scores as a Markdown table; standard errors behind ±."""
    lines = [("benchmark", "score", "value", "of", "lmms-eval's", "questions", "prompt")]
    for outcome in outcomes:
        some = "" if len(outcome.rows) == outcome.available else f" of {outcome.available}"
        for score in outcome.scores:
            if is_part(score.name):
                continue
            unit = 100 if score.maximum == 1 else 1
            error = "" if not score.standard_error else f" ± {unit * score.standard_error:.2f}"
            theirs = "" if score.lmms_eval is None else f"{unit * score.lmms_eval:.2f}"
            value, most = f"{unit * score.value:.2f}{error}", f"{unit * score.maximum:g}"
            asked = f"{len(outcome.rows)}{some}"
            lines.append((outcome.benchmark.name, score.name, value, most, theirs, asked, outcome.prompt_version))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows) + "\n"


def _plain(labels: Any) -> dict[str, Any]:
    return {
        name: value if isinstance(value, (str, int, float, list, type(None))) else str(value)
        for name, value in labels.items()
    }
