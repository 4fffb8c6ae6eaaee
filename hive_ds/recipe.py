"""Recipes: YAML files that name a run's every value, laid over a base recipe and under ``--set`` options.

Precedence, stated once: defaults of `hive_ds.config` < ``base:`` recipe < the file < ``--set``. The ``data`` of a stage
is the recipe's, under what the stage itself writes there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from hive_ds.config import Recipe
from hive_ds.errors import HiveError
from hive_ds.recipe_source import Entry, merge, read_file, read_override, read_value
from hive_ds.recipe_values import Origins, build, nearest

RECIPES = Path(__file__).resolve().parent / "recipes"
"""The recipes that come with the package."""
_LONGEST_CHAIN = 100
"""Recipes of a chain of bases; Python's stack would end at some hundred."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path, with ``--set`` options such as ``"model.rope=1d"``. Raises HiveError."""
    return resolve(name_or_path, overrides)[0]


def resolve(name_or_path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Origins]:
    """Like `load_recipe`, and where each value came from, by dotted key.

    An origin is ``default``, ``--set``, ``FILE:LINE``, or ``base FILE:LINE`` for a value of a base recipe.
    """
    entries = _read_with_bases(str(name_or_path), chain=())
    for option in overrides:
        entries = merge(entries, read_override(option))
    origins: Origins = {}
    return build(Recipe, _with_stage_data(_with_routes(entries)), str(name_or_path), origins), origins


def _with_routes(entries: dict[str, Entry]) -> dict[str, Entry]:
    """``entries`` with the routes that ``model.routes`` gives as a number, spread over the depths of both models."""
    model = entries.get("model")
    section = model.content if model is not None and isinstance(model.content, dict) else {}
    scalars = {name: one.content for name, one in section.items() if isinstance(one.content, yaml.ScalarNode)}
    if model is None or not {"routes", "vision_encoder", "language_model"} <= set(scalars):
        return entries  # lists of routes, or `build` says what is wrong
    routes, count = section["routes"], scalars["routes"]
    if not count.tag.endswith(":int"):
        return entries
    from hive_ds.model.loading import read_language_config, read_vision_config  # torch: most recipes do without
    from hive_ds.model.routes import spread_routes

    try:
        number = int(count.value)
    except ValueError:  # YAML has more ways to write one
        return entries
    vision = read_vision_config(scalars["vision_encoder"].value)
    language = read_language_config(scalars["language_model"].value)
    try:
        spread = spread_routes(number, vision.num_hidden_layers, language.num_hidden_layers)
    except HiveError as error:
        raise HiveError(f"model.routes ({routes.origin}): {error}") from None
    lists = zip(("vision_blocks", "language_layers"), spread, strict=True)
    given = Entry({name: read_value(str(list(numbers)), routes.origin) for name, numbers in lists}, routes.origin)
    return {**entries, "model": Entry({**section, "routes": given}, model.origin)}


def _with_stage_data(entries: dict[str, Entry]) -> dict[str, Entry]:
    """``entries`` with the ``data`` of each stage that has its own laid over the recipe's, key by key."""
    below, stages = entries.get("data"), entries.get("stages")
    if below is None or stages is None or not isinstance(below.content, dict) or not isinstance(stages.content, dict):
        return entries  # `build` says what is wrong
    filled = {
        name: Entry({**stage.content, "data": Entry({**below.content, **own.content}, own.origin)}, stage.origin)
        for name, stage in stages.content.items()
        if isinstance(stage.content, dict) and (own := stage.content.get("data")) and isinstance(own.content, dict)
    }
    return {**entries, "stages": Entry({**stages.content, **filled}, stages.origin)}


def _find(name_or_path: str, relative_to: Path) -> Path:
    """A recipe's file: what holds a slash or ends in ``.yaml`` is a path, all else the name of one in the package."""
    if "/" in name_or_path or name_or_path.endswith(".yaml"):
        path = relative_to / os.path.expanduser(name_or_path)
        if not path.is_file():
            raise HiveError(f"recipe {name_or_path}: no such file (looked for {path}); expected a YAML file")
        return path
    if name_or_path not in recipe_names():
        hint = nearest(name_or_path, recipe_names(), cutoff=0.4)
        known = ", ".join(recipe_names())
        raise HiveError(f"recipe {name_or_path}: expected one of {known}, or a path that ends in .yaml{hint}")
    return RECIPES / f"{name_or_path}.yaml"


def _read_with_bases(name_or_path: str, chain: tuple[Path, ...]) -> dict[str, Entry]:
    path = _find(name_or_path, relative_to=chain[-1].parent if chain else Path()).resolve()
    shown = path.name if path.parent == RECIPES else name_or_path
    if path in chain:
        names = " -> ".join(link.name for link in (*chain, path))
        raise HiveError(f"recipe {shown}: its base leads back to itself ({names}); expected a chain with an end")
    if len(chain) > _LONGEST_CHAIN:
        raise HiveError(f"recipe {chain[0].name}: more than {_LONGEST_CHAIN} bases upon one another; expected few")
    entries = read_file(path, f"base {shown}" if chain else shown)
    base = entries.pop("base", None)
    if base is None:
        return entries
    if not isinstance(base.content, yaml.ScalarNode) or base.is_null:
        raise HiveError(f"base = {base.text} ({base.origin}): expected the name or path of one recipe")
    return merge(_read_with_bases(base.content.value, (*chain, path)), entries)


def dump_recipe(recipe: Recipe, origins: Origins | None = None) -> str:
    """The whole recipe as YAML that `load_recipe` reads back to an equal one; with ``origins``, one comment a value."""
    lines = [(text, (origins or {}).get(key, "")) for key, text in _yaml_lines(recipe)]
    widths = [len(text) for text, origin in lines if origin]
    column = min(max(widths, default=0), 60)
    return "".join(f"{text:<{column}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def override(key: str, value: Any) -> str:
    """The ``--set`` option that gives ``key`` this value, in quotes where YAML would read it otherwise (``run #1``)."""
    return f"{key}={_yaml_value(str(value) if isinstance(value, Path) else value)}"


def _yaml_lines(value: Any, prefix: str = "", indent: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and YAML line of every value below a dataclass or mapping."""
    pairs = [(spec.name, getattr(value, spec.name)) for spec in fields(value)] if is_dataclass(value) else value.items()
    for name, item in pairs:
        if is_dataclass(item) or (isinstance(item, dict) and item):
            yield "", f"{indent}{_yaml_value(name)}:"
            yield from _yaml_lines(item, f"{prefix}{name}.", indent + "  ")
        else:
            yield f"{prefix}{name}", f"{indent}{_yaml_value(name)}: {_yaml_value(item)}"


def _yaml_value(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")
