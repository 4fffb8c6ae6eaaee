"""What a run is made of: recipe, package and library versions, commit; written with checkpoints, compared on resume."""

from __future__ import annotations

from typing import Any

import yaml

from hive_ds.config import Recipe
from hive_ds.recipe import dump_recipe
from hive_ds.versions import installed_versions


def describe_origin(recipe: Recipe) -> dict[str, Any]:
    """Dotted recipe keys and their values, and ``version.NAME`` of each library; flat, so that two compare by line."""
    origin = flatten("recipe", yaml.safe_load(dump_recipe(recipe)))
    return origin | {f"version.{name}": value for name, value in installed_versions().items()}


def flatten(name: str, value: Any) -> dict[str, Any]:
    """Dotted keys below ``name``, and their values, of nested mappings."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in flatten(f"{name}.{part}", inner).items()}
