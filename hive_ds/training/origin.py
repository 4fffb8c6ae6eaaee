"""What a run is made of: recipe, package and library versions, commit; written with checkpoints, compared on resume."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from hive_ds import __version__
from hive_ds.config import Recipe
from hive_ds.recipe import dump_recipe

LIBRARIES = ("torch", "deepspeed", "transformers", "triton", "mosaicml-streaming")


def describe_origin(recipe: Recipe) -> dict[str, Any]:
    """Dotted recipe keys and their values, and ``version.NAME`` of each library; flat, so that two compare by line."""
    origin = _flat("recipe", yaml.safe_load(dump_recipe(recipe)))
    origin["version.hive-ds"] = __version__
    origin["version.commit"] = _commit()
    for library in LIBRARIES:
        try:
            origin[f"version.{library}"] = version(library)
        except PackageNotFoundError:
            origin[f"version.{library}"] = None
    return origin


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in _flat(f"{name}.{part}", inner).items()}


def _commit() -> str | None:
    """Commit of the clone that this package is run from, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
