"""From a tree of written values to the frozen dataclasses of `hive_ds.config`: types, checks, and errors that help."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from hive_ds.checks import Check
from hive_ds.config import Recipe
from hive_ds.errors import HiveError
from hive_ds.recipe_source import Entry
from hive_ds.stages import STAGES

TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

Origins = dict[str, str]
"""By dotted key: where the value was written, or ``default``."""


def build(cls: type, entries: dict[str, Entry], source: str, origins: Origins, prefix: str = "") -> Any:
    """Make the dataclass ``cls`` of the values in ``entries``; ``origins`` is filled with one row a value.

    ``source`` names the recipe and ``prefix`` the place in it, for messages. Raises HiveError for unknown and missing
    keys, wrong types and values that a check refuses.
    """
    hints = get_type_hints(cls, include_extras=True)
    for name in entries:
        if name not in hints:
            raise _unknown_key(prefix + name, entries[name], list(hints))
    values = {}
    for spec in fields(cls):
        key = prefix + spec.name
        if spec.name in entries:
            values[spec.name] = _convert(hints[spec.name], entries[spec.name], key, source, origins)
        else:
            values[spec.name] = _default(spec, hints[spec.name], key, source, origins)
    try:
        return cls(**values)
    except HiveError as error:
        written = {name: entry.origin for name, entry in entries.items()}
        words = set(re.findall(r"\w+", str(error)))
        blamed = [origin for name, origin in written.items() if name in words] or list(written.values())
        raise HiveError(f"{prefix.rstrip('.') or source} ({', '.join(dict.fromkeys(blamed))}): {error}") from None


def _default(spec: Field[Any], hint: Any, key: str, source: str, origins: Origins) -> Any:
    if spec.default is MISSING and spec.default_factory is MISSING:
        raise HiveError(f"{source}: {key} is missing; expected {describe(hint)}")
    hint, _ = _split(hint)
    if is_dataclass(hint):
        return build(hint, {}, source, origins, f"{key}.")  # type: ignore[arg-type]
    origins[key] = "default"
    return spec.default_factory() if callable(spec.default_factory) else spec.default


def _convert(hint: Any, entry: Entry, key: str, source: str, origins: Origins) -> Any:
    """One written value as its field's type, checked."""
    kind, check = _split(hint)
    section = _section(kind)
    if section and not (entry.is_null and section is not kind):
        if not isinstance(entry.content, dict):
            raise _wrong_value(key, entry, hint)
        return build(section, entry.content, source, origins, f"{key}.")
    mapping = next((option for option in _options(kind) if get_origin(option) is dict), None)
    if mapping and (mapping is kind or isinstance(entry.content, dict)):
        value: Any = _mapping(mapping, entry, key, source, origins, check)
    else:
        origins[key] = entry.origin
        value = _plain(kind, entry)
    if value is _WRONG or (check and value is not None and not check.accepts(value)):
        raise _wrong_value(key, entry, hint)
    return value


def _mapping(kind: Any, entry: Entry, key: str, source: str, origins: Origins, check: Check | None) -> Any:
    """A mapping with free keys. A key set to null is taken out: the only way to drop what a base recipe gave."""
    if not isinstance(entry.content, dict):
        return _WRONG
    choices = check.choices if check else ()
    value = {}
    for name, item in entry.content.items():
        if choices and name not in choices:
            raise _unknown_key(f"{key}.{name}", item, list(choices))
        if not item.is_null:
            value[name] = _convert(get_args(kind)[1], item, f"{key}.{name}", source, origins)
    if not value:
        origins[key] = entry.origin
    return value


_WRONG = object()


def _plain(kind: Any, entry: Entry) -> Any:
    """A scalar or a list of scalars as ``kind``; `_WRONG` where it is something else."""
    options = _options(kind)
    if entry.is_null:
        return None if types.NoneType in options else _WRONG
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    if isinstance(entry.content, yaml.ScalarNode) and entry.content.value in words:
        return entry.content.value
    kind = next(option for option in options if option is not types.NoneType)
    if get_origin(kind) is tuple:
        return _tuple(get_args(kind), entry)
    return _scalar(kind, entry.content) if isinstance(entry.content, yaml.ScalarNode) else _WRONG


def _section(kind: Any) -> type | None:
    """The dataclass that ``kind`` is, alone or beside null; None where it is none."""
    return next((option for option in _options(kind) if isinstance(option, type) and is_dataclass(option)), None)


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union, else ``kind`` alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _tuple(args: tuple[Any, ...], entry: Entry) -> Any:
    if not isinstance(entry.content, list):
        return _WRONG
    kinds = args if args[-1] is not Ellipsis else args[:1] * len(entry.content)
    if len(kinds) != len(entry.content):
        return _WRONG
    values = tuple(_plain(kind, item) for kind, item in zip(kinds, entry.content, strict=True))
    return _WRONG if _WRONG in values else values


def _scalar(kind: type, node: yaml.ScalarNode) -> Any:
    if kind is str:
        return node.value
    if kind is bool:
        return yaml.SafeLoader.bool_values[node.value.lower()] if node.tag.endswith(":bool") else _WRONG
    try:
        if kind is int:
            return int(node.value)
        number = float(node.value)
    except ValueError:
        return _WRONG
    return number if math.isfinite(number) else _WRONG


def describe(hint: Any) -> str:
    """What a field expects, in words: its type and its check."""
    kind, check = _split(hint)
    words = _type_words(kind)
    if check and check.choices and words == TYPE_WORDS[str]:
        return check.expected
    return f"{words}, {check.expected}" if check else words


def _type_words(kind: Any) -> str:
    args = get_args(kind)
    if len(_options(kind)) > 1:
        plain = [option for option in args if get_origin(option) is not Literal]  # a word stands in the check
        return " or ".join("null" if option is types.NoneType else _type_words(option) for option in plain)
    if get_origin(kind) is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values, each {TYPE_WORDS[args[0]]}"
    if get_origin(kind) is tuple:
        return f"a list, each value {TYPE_WORDS[args[0]]}"
    if get_origin(kind) is dict or is_dataclass(kind):
        return "a mapping"
    return TYPE_WORDS[kind]


def _split(hint: Any) -> tuple[Any, Check | None]:
    if get_origin(hint) is not Annotated:
        return hint, None
    kind, check = get_args(hint)
    return kind, check


def nearest(word: str, choices: list[str], cutoff: float = 0.6) -> str:
    """``; did you mean X?`` when one of ``choices`` is close to ``word`` (0 to 1, as difflib has it), else nothing."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def _wrong_value(key: str, entry: Entry, hint: Any) -> HiveError:
    check = _split(hint)[1]
    hint_text = nearest(entry.text, list(check.choices)) if check else ""
    return HiveError(f"{key} = {entry.text} ({entry.origin}): expected {describe(hint)}{hint_text}")


def _unknown_key(key: str, entry: Entry, siblings: list[str]) -> HiveError:
    parent, _, name = key.rpartition(".")
    elsewhere = [known for known in known_keys(Recipe) if known.rpartition(".")[2] == name]
    hint_text = nearest(name, siblings)
    by_number = {str(stage.number): stage.name for stage in STAGES}
    if parent == "stages" and name in by_number:
        hint_text = f"; stage {name} is stages.{by_number[name]}"
    if not hint_text and elsewhere:
        hint_text = f"; did you mean {elsewhere[0]}?"
    if not hint_text:
        hint_text = f"; {parent or 'a recipe'} has {', '.join(siblings)}"
    return HiveError(f"unknown key {key} = {entry.text} ({entry.origin}){hint_text}")


def known_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe may hold; the key of a stage is written ``<stage>``."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        kind, _ = _split(hint)
        free = get_origin(kind) is dict
        section = _section(get_args(kind)[1] if free else kind)
        if section:
            yield from known_keys(section, f"{prefix}{name}.{'<stage>.' if free else ''}")
        else:
            yield prefix + name
