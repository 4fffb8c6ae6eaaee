"""The model card of an exported folder: what it is, how it loads, where it comes from, what it cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hive_ds.errors import told_as
from hive_ds.evaluation.scoring import is_part
from hive_ds.export.run_facts import StageFacts, find_scores, licences, read_stage, training_versions
from hive_ds.export.source import Source
from hive_ds.stages import STAGES, VLM_STAGES
from hive_ds.versions import installed_versions

RECIPE = "recipe.yaml"
SCORES = "scores.json"
PAPER = "arXiv 2604.00086"


@dataclass(frozen=True)
class Section:
    """A heading of the card, and what stands below it; left out where there is nothing."""

    title: str
    text: str


def write_card(
    folder: Path,
    title: str,
    library: str,
    sections: list[Section],
    source: Source,
    *,
    scores: Path | None,
    judged: tuple[str, Collection[str]],
) -> None:
    """Write ``README.md``; beside it the whole recipe, and the scores, where there are any.

    Args:
        folder: to write into.
        title: the card's heading.
        library: that the folder is for, as model hubs call it.
        sections: what stands above the run's facts.
        source: of the model.
        scores: a JSON file of results; None: those that are found in the run.
        judged: key of the scores' hash, and the hashes that may stand there (`find_scores`).

    Raises:
        HiveError: the scores are not JSON, or of other weights; recipe or metrics of the run are damaged.
    """
    run = source.stages[-1].parent if source.stages else None
    results = find_scores(scores, run, *judged)
    if results:
        (folder / SCORES).write_text(f"{json.dumps(results, indent=2)}\n")
    shown = [*sections, *_run_sections(folder, source), Section("Scores", _score_text(results)), _versions(source)]
    head = f"---\nlibrary_name: {library}\ntags: [hive, vision]\n---\n# {title}\n"
    parts = [f"## {section.title}\n\n{section.text}\n" for section in shown if section.text]
    (folder / "README.md").write_text("\n".join([head, *parts]))


def _run_sections(folder: Path, source: Source) -> list[Section]:
    if not source.stages:
        return [Section("Training", "The folder that this was exported from lies in no run: its recipe is not known.")]
    last = source.stages[-1]
    text, name = "", ""
    if (last / RECIPE).is_file():
        shutil.copyfile(last / RECIPE, folder / RECIPE)
        with told_as(str(last / RECIPE), "the recipe that training leaves there"):
            recipe = yaml.safe_load((last / RECIPE).read_text())
            text, name = _recipe_text(recipe, source.stage_number or 0), recipe["name"]
    facts = [stage for path in source.stages if (stage := read_stage(path)) is not None]
    return [
        Section("Recipe", text),
        Section("Cost", _cost_table(facts)),
        Section("Licences", _licence_text(name)),
    ]


def _recipe_text(recipe: dict[str, Any], last: int) -> str:
    """What the model is made of, up to stage ``last``, its own."""
    model, data = recipe["model"], recipe["data"]
    sets = {"train": data["train"], "validation": data["validation"], "text validation": data["text_validation"]}
    done = {stage.name: recipe["stages"].get(stage.name, {}) for stage in STAGES if stage.number <= last}
    own = {name: stage["data"]["train"] for name, stage in done.items() if stage.get("data")}
    judge = (recipe.get("vlm") if last >= VLM_STAGES[0].number else None) or {}
    rows = [
        ("recipe", f"{recipe['name']}: {recipe['description']}"),
        ("vision encoder", model["vision_encoder"]),
        ("language model", model["language_model"]),
        *([("language model, stages 4 and 5", judge["language_model"])] if judge else []),
        *((f"data, {name}", _folders(value)) for name, value in {**sets, **own}.items() if value),
        ("seed", recipe["training"]["seed"]),
    ]
    return f"{_table(('', ''), rows)}\n\nEvery value stands in [{RECIPE}]({RECIPE})."


def _folders(value: str | dict[str, float]) -> str:
    return value if isinstance(value, str) else ", ".join(f"{name} ({share})" for name, share in value.items())


def _cost_table(facts: list[StageFacts]) -> str:
    if not facts:
        return ""
    rows = [
        (
            f.name,
            f.steps,
            f.samples,
            f.devices,
            f"{f.hours:.4g}",
            f"{f.flops:.4g}",
            "" if f.loss is None else f"{f.loss:.4g}",
        )
        for f in facts
    ]
    total = ("together", sum(f.steps for f in facts), sum(f.samples for f in facts), "")
    rows.append((*total, f"{sum(f.hours for f in facts):.4g}", f"{sum(f.flops for f in facts):.4g}", ""))
    heads = ("stage", "steps", "samples", "devices", "device-hours", "model FLOPs", "last loss")
    return (
        f"{_table(heads, rows)}\n\nOut of the run's metrics: time and FLOPs of training steps, without loading, "
        "validation, checkpoints, and steps that were lost to a failure."
    )


def _licence_text(recipe: str) -> str:
    lines = licences(recipe)
    if not lines:
        return "The recipe states none. See those of the models and data that it names."
    return "As the recipe states them:\n\n" + "\n".join(f"    {line}" for line in lines)


def _score_text(results: dict[str, Any]) -> str:
    """Main scores of benchmarks in a table; of other results, the file that holds them."""
    rows = []
    for name, result in results.items():
        with told_as(f"scores {name}", "JSON as hive-ds eval writes it"):
            rows += _score_rows(name, result)
    heads = ("results", "benchmark", "prompt", "questions", "score", "value", "of")
    table = _table(heads, rows) + "\n\n" if rows else ""
    return f"{table}Whole: [{SCORES}]({SCORES}), from {', '.join(results)}." if results else ""


def _score_rows(name: str, result: Any) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            benchmark,
            found["prompt_version"],
            f"{found['samples']} of {found['available']}",
            score["name"],
            f"{score['value']:.4g}",
            score["maximum"],
        )
        for benchmark, found in (result.get("benchmarks", {}) if isinstance(result, dict) else {}).items()
        for score in found["scores"]
        if not is_part(score["name"])
    ]


def _versions(source: Source) -> Section:
    trained = training_versions(source.stages[-1]) if source.stages else {}
    exported = installed_versions()
    rows = [(name, trained.get(name) or "not recorded", exported.get(name) or "none") for name in exported]
    return Section("Versions", _table(("", "training", "export"), rows))


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
