"""Tables of runs: recipe and what differs, validation, cost, versions."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from hive_ds.events import of_kind, series
from hive_ds.export.run_facts import StageFacts, training_versions
from hive_ds.plots import short
from hive_ds.report.run import RunRecord, StageRecord

Rows = list[list[str]]
_SHOWN = (
    ("recipe", "name"),
    ("described as", "description"),
    ("vision encoder", "model.vision_encoder"),
    ("language model", "model.language_model"),
    ("joined as", "model.kind"),
    ("vision blocks", "model.routes.vision_blocks"),
    ("into LLM layers", "model.routes.language_layers"),
    ("judged with", "vlm.language_model"),
    ("training data", "data.train"),
    ("held-out data", "data.validation"),
    ("precision", "training.precision"),
    ("ZeRO policy", "training.ds_config"),
    ("seed", "training.seed"),
)
_OF_STAGES = ("lr", "global_batch_size", "micro_batch_size", "steps", "epochs", "clip")
_STAGE = r"stages\.\w+"
_UNNAMED = ("name", "description")
"""Keys that always differ between recipes, and say nothing of the training."""


def recipe_rows(run: RunRecord) -> Rows:
    """What the recipe is, in short."""
    rows = [[label, _in_words(run.flat_recipe, key)] for label, key in _SHOWN]
    return [row for row in rows if row[1]]


def _in_words(flat: dict[str, Any], key: str) -> str:
    """A value; of several data folders each with its weight."""
    weights = {name.removeprefix(f"{key}."): weight for name, weight in flat.items() if name.startswith(f"{key}.")}
    return text(flat.get(key)) or ", ".join(f"{folder} ({text(weight)})" for folder, weight in weights.items())


def stage_rows(run: RunRecord) -> Rows:
    """The numbers of each stage that the run has."""
    stages = [stage for stage in run.stages if stage.recipe]
    flat = run.flat_recipe
    names = {stage.number: _name(stage) for stage in stages}
    head = ["", *(f"stage {number}" for number in names)]
    rows = [[key, *(text(flat.get(f"stages.{name}.{key}")) for name in names.values())] for key in _OF_STAGES]
    return [head, *(row for row in rows if any(row[1:]))] if stages else []


def difference_rows(runs: Sequence[RunRecord]) -> Rows:
    """Every value in which the recipes differ; a stage that some recipe lacks is one row."""
    flats = [run.flat_recipe for run in runs]
    rows = []
    for key in dict.fromkeys(_whole_stage(key, flats) for flat in flats for key in flat):
        if re.fullmatch(_STAGE, key):
            values = ["yes" if any(one.startswith(f"{key}.") for one in flat) else "left out" for flat in flats]
        else:
            values = [text(flat.get(key, "")) for flat in flats]
        if key not in _UNNAMED and len(set(values)) > 1:
            rows.append([key, *values])
    return [["", *(run.name for run in runs)], *rows] if rows else []


def _whole_stage(key: str, flats: Sequence[dict[str, Any]]) -> str:
    """The stage that ``key`` belongs to, where one of the recipes does without that stage; else ``key``."""
    stage = re.match(rf"{_STAGE}\.", key)
    if stage and not all(any(one.startswith(stage[0]) for one in flat) for flat in flats):
        return stage[0].removesuffix(".")
    return key


def validation_rows(runs: Sequence[RunRecord]) -> Rows:
    """First, best and last held-out loss of every stage."""
    rows = []
    for run, stage in _stages(runs):
        for key, label in (("loss", "held out"), ("text_loss", "text alone")):
            losses = [value for _, value in series(stage.events, "validation", key)]
            if losses:
                named = f"{stage.number} {label}"
                rows.append([run.name, named, *(f"{one:.4f}" for one in (losses[0], min(losses), losses[-1]))])
        if answers := of_kind(stage.events, "answers"):
            shares = [100 * one["share"] for one in answers]
            named = f"{stage.number} questions right"
            rows.append([run.name, named, *(f"{one:.1f} %" for one in (shares[0], max(shares), shares[-1]))])
    return [["run", "stage", "first", "best", "last"], *rows] if rows else []


def cost_rows(runs: Sequence[RunRecord]) -> Rows:
    """Time, FLOPs and memory of every stage, and of each run that has several."""
    rows: Rows = []
    for run in runs:
        found = [(stage.number, facts) for stage in run.stages if (facts := stage.facts) is not None]
        for number, facts in found:
            rows.append(
                [
                    run.name,
                    str(number),
                    f"{facts.steps:,}",
                    f"{facts.samples:,}",
                    facts.devices,
                    f"{facts.hours:.3g}",
                    f"{facts.seconds / max(facts.steps, 1):.3g}",
                    f"{short(facts.flops / 1e12)} T",
                    f"{100 * facts.mfu:.1f} %",
                    "" if facts.memory_gb is None else f"{facts.memory_gb:.2f} GB",
                ]
            )
        if len(found) > 1:
            rows.append(_total(run, [facts for _, facts in found]))
    head = ["run", "stage", "steps", "samples", "devices", "device-hours", "s/step", "model FLOPs", "MFU", "memory"]
    return [head, *rows] if rows else []


def _total(run: RunRecord, facts: Sequence[StageFacts]) -> list[str]:
    steps, samples = sum(one.steps for one in facts), sum(one.samples for one in facts)
    hours, flops = sum(one.hours for one in facts), sum(one.flops for one in facts)
    memory = max((one.memory_gb for one in facts if one.memory_gb is not None), default=None)
    most = "" if memory is None else f"{memory:.2f} GB"
    return [run.name, "all", f"{steps:,}", f"{samples:,}", "", f"{hours:.3g}", "", f"{short(flops / 1e12)} T", "", most]


def version_rows(runs: Sequence[RunRecord]) -> Rows:
    """Versions that each run's last stage trained with."""
    found = [_versions(run) for run in runs]
    names = dict.fromkeys(name for versions in found for name in versions)
    rows = [[name, *(text(versions.get(name)) or "not recorded" for versions in found)] for name in names]
    return [["", *(run.name for run in runs)], *rows] if rows else []


def _versions(run: RunRecord) -> dict[str, Any]:
    return next((found for stage in reversed(run.stages) if (found := training_versions(stage.folder))), {})


def text(value: Any) -> str:
    """A recipe's value as it reads best."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def when(seconds: float) -> str:
    """A time since the epoch, on this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _stages(runs: Sequence[RunRecord]) -> list[tuple[RunRecord, StageRecord]]:
    return [(run, stage) for run in runs for stage in run.stages]


def _name(stage: StageRecord) -> str:
    return stage.title.partition(": ")[2].replace(" ", "_")
