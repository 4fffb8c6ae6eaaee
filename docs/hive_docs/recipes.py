"""The reference of recipes: every key of `hive_ds.config`, and what each recipe of the package says."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import takewhile
from typing import Any, get_args, get_type_hints

import yaml

from hive_docs.markdown import MADE, cell, code, from_docstring, table
from hive_ds import config
from hive_ds.recipe import RECIPES, dump_recipe, load_recipe, recipe_names
from hive_ds.recipe_values import describe

INTRODUCTION = """\
# Recipes

A recipe is a YAML file with these keys. Precedence: defaults < the recipe that `base:` names < the file <
`--set key=value`; a mapping is laid over the one below key by key, a list replaces it whole, null takes a stage out.
Unknown keys are errors. `hive-ds recipe show NAME` prints every value of a recipe and where it came from.

"""

SHIPPED = """\
## The recipes of the package

`--recipe NAME` takes one of these, or the path of a `.yaml` file, which may begin with `base: NAME`.

"""


OWN = ("name", "description")
"""Keys in which recipes differ of themselves."""


def recipes_page() -> str:
    """The page."""
    keys = [_section(name, cls) for name, cls in sections()]
    names = recipe_names()
    summary = table(
        ["recipe", ""], [[f"[`{name}`](#{anchor(name)})", cell(load_recipe(name).description)] for name in names]
    )
    return MADE + INTRODUCTION + "\n".join(keys) + "\n" + SHIPPED + summary + "".join(map(_recipe, names))


def anchor(heading: str) -> str:
    """The name by which a link finds a heading, as GitHub makes it."""
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def sections(cls: type = config.Recipe, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every part of a recipe: its dotted key, empty for the recipe itself, and its class."""
    yield prefix, cls
    if prefix.count(".") == 2:
        return  # the data of a stage are those of `data`
    for name, hint in get_type_hints(cls).items():
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and is_dataclass(part):
                free = ".STAGE" if part is config.StageConfig else ""
                below = f"{prefix}.{name}{free}".lstrip(".")
                if below != "stages.STAGE.data":
                    yield from sections(part, below)


def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass; empty for a field without one."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    name = None
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            docs[name] = ""
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[name], name = str(node.value.value), None
        else:
            name = None
    return docs


def _section(prefix: str, cls: type) -> str:
    hints, docs = get_type_hints(cls, include_extras=True), field_docs(cls)
    rows = [
        [code(spec.name), cell(describe(hints[spec.name])), _default(spec), from_docstring(docs[spec.name])]
        for spec in fields(cls)
    ]
    heading = f"## {prefix or 'The recipe'}\n\n"
    summary = from_docstring(inspect.getdoc(cls) or "")
    return heading + summary + "\n\n" + table(["key", "expects", "default", ""], rows)


def _default(spec: Field[Any]) -> str:
    if spec.default_factory is not MISSING:
        value = spec.default_factory()
        return code("{}") if is_dataclass(value) else code(_text(value))
    return "needed" if spec.default is MISSING else code(_text(spec.default))


def _text(value: Any) -> str:
    """A value as one may write it in YAML."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def _recipe(name: str) -> str:
    """What a recipe says of its own: the whole file, or, where it has a base, in what the two differ."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    base = yaml.safe_load(text).get("base")
    if not base:
        return f"\n### {name}\n\n```yaml\n{text}```\n"
    comment = "".join(takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    paragraphs = [cell(part) for part in re.sub("^# ?", "", comment, flags=re.M).split("\n\n")]
    rows = [[code(key), code(old), code(new)] for key, old, new in changes(base, name)]
    under = f"On top of [`{base}`](#{anchor(base)}):"
    return "\n\n".join([f"\n### {name}", *paragraphs, under, table(["key", "there", "here"], rows)])


def changes(base: str, name: str) -> list[tuple[str, str, str]]:
    """Dotted key, value of ``base`` and value of ``name``, of every value in which two recipes differ.

    A part that only one of them has is one row, and null in the other.
    """
    before, after = (yaml.safe_load(dump_recipe(load_recipe(one))) for one in (base, name))
    return [(key, _text(old), _text(new)) for key, old, new in _differences(before, after, "") if key not in OWN]


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", _short(old), _short(new)


def _short(value: Any) -> Any:
    """A whole part of a recipe as what it is called in a table."""
    return "(given)" if isinstance(value, dict) and value else value
