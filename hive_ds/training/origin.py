"""What a run is made of: recipe, package and library versions, commit; written with checkpoints, compared on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hive_ds.config import Recipe
from hive_ds.errors import told_as
from hive_ds.recipe import dump_recipe
from hive_ds.stages import VLM_STAGES, Stage
from hive_ds.versions import installed_versions


def describe_origin(recipe: Recipe) -> dict[str, Any]:
    """Dotted recipe keys and their values, and ``version.NAME`` of each library; flat, so that two compare by line."""
    origin = flatten("recipe", yaml.safe_load(dump_recipe(recipe)))
    return origin | {f"version.{name}": value for name, value in installed_versions().items()}


def changed_values(written: Path, recipe: Recipe, stage: Stage) -> list[str]:
    """What of ``recipe`` differs from the one that ``stage`` has ``written`` to its folder, a line a value.

    What is not for this stage is left out, and nothing can be said where the file is gone.
    """
    if not written.is_file():
        return []
    with told_as(str(written), "the recipe that training leaves there"):
        before = flatten("recipe", yaml.safe_load(written.read_text()))
    now = flatten("recipe", yaml.safe_load(dump_recipe(recipe)))
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    others = ("recipe.stages.",) if stage in VLM_STAGES else ("recipe.stages.", "recipe.vlm.")
    return [
        f"{name} = {before.get(name)}, not {now.get(name)}"
        for name in names
        if name.startswith(f"recipe.stages.{stage.name}.") or not name.startswith(others)
    ]


def changed_bases(written: Path, recipe: Recipe, stage: Stage) -> list[str]:
    """Of `changed_values`, the base models: an earlier stage has ``written`` the model that ``stage`` goes on with."""
    names = ("vlm.language_model",) if stage in VLM_STAGES else ("model.vision_encoder", "model.language_model")
    return [
        line
        for line in changed_values(written, recipe, stage)
        if line.startswith(tuple(f"recipe.{name} = " for name in names))
    ]


def flatten(name: str, value: Any) -> dict[str, Any]:
    """Dotted keys below ``name``, and their values, of nested mappings."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in flatten(f"{name}.{part}", inner).items()}
