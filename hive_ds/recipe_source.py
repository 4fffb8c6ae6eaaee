"""Recipe files and ``--set`` options as trees of YAML values that know where they were written.

Values stay as they were written until `hive_ds.recipe_values` knows the type of the field they are for: YAML 1.1 takes
``1e-3`` for text and ``no`` for a truth value, and the field knows better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from hive_ds.errors import HiveError


@dataclass(frozen=True)
class Entry:
    """One value of a recipe and the place it was written at, as ``file:line`` or ``--set``."""

    content: dict[str, Entry] | list[Entry] | yaml.ScalarNode
    origin: str

    @property
    def text(self) -> str:
        """The value as one line, for messages."""
        if isinstance(self.content, dict):
            return "{" + ", ".join(f"{key}: {entry.text}" for key, entry in self.content.items()) + "}"
        if isinstance(self.content, list):
            return "[" + ", ".join(entry.text for entry in self.content) + "]"
        return "null" if self.is_null else " ".join(self.content.value.split())

    @property
    def is_null(self) -> bool:
        """Whether the value is YAML's null (also: nothing written after the colon)."""
        return isinstance(self.content, yaml.ScalarNode) and self.content.tag == "tag:yaml.org,2002:null"


_DEEPEST = 20
"""Levels of keys and lists in one another; recipes have five, and Python's stack would end at some hundred."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases and what is nested deep: a recipe has no use for them."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor}: recipes have no aliases")
        if self.depth > _DEEPEST:
            raise yaml.YAMLError(f"nested more than {_DEEPEST} levels deep; recipes are not")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, source: str, *, lines: bool) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if lines and error.problem_mark else ""
        raise HiveError(f"{source}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise HiveError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    return node or yaml.ScalarNode("tag:yaml.org,2002:null", "")


def _entry(node: yaml.Node, source: str, *, lines: bool) -> Entry:
    origin = f"{source}:{node.start_mark.line + 1}" if lines and node.start_mark else source
    if isinstance(node, yaml.MappingNode):
        return Entry(dict(_items(node, source, lines=lines)), origin)
    if isinstance(node, yaml.SequenceNode):
        return Entry([_entry(child, source, lines=lines) for child in node.value], origin)
    assert isinstance(node, yaml.ScalarNode)
    return Entry(node, origin)


def _items(node: yaml.MappingNode, source: str, *, lines: bool) -> Iterator[tuple[str, Entry]]:
    """The pairs of a mapping; a key that stands twice is an error, where YAML would let the last one win in silence."""
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise HiveError(f"{source}:{line}: a key is a list or a mapping; expected a name")
        key = key_node.value
        if key in first_line:
            raise HiveError(f"{source}:{line}: key {key} was given before, at line {first_line[key]}; expected it once")
        first_line[key] = line
        entry = _entry(value_node, source, lines=lines)
        yield key, Entry(entry.content, f"{source}:{line}") if lines else entry


def read_file(path: Path, shown_as: str) -> dict[str, Entry]:
    """Read one recipe file, without its base. ``shown_as`` names the file in origins and messages."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise HiveError(f"recipe {shown_as}: {reason}; expected a YAML file") from error
    entry = _entry(_compose(text, shown_as, lines=True), shown_as, lines=True)
    if not isinstance(entry.content, dict):
        raise HiveError(f"recipe {shown_as}: the file holds {entry.text[:40]}; expected `key: value` lines")
    return entry.content


def read_override(option: str) -> dict[str, Entry]:
    """Read one ``--set a.b=c``: the value is YAML, so lists, mappings and null work; later options win."""
    key, equals, value = option.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise HiveError(f"--set {option}: expected key=value, with dots between nested keys, as model.rope=1d")
    if len(names) > _DEEPEST:
        raise HiveError(f"--set {option[:40]}...: {len(names)} nested keys; recipes have five at most")
    entry = _entry(_compose(value, f"--set {option}", lines=False), "--set", lines=False)
    for name in reversed(names):
        entry = Entry({name: entry}, "--set")
    assert isinstance(entry.content, dict)
    return entry.content


def read_value(text: str, origin: str) -> Entry:
    """A value as YAML has it, from ``origin``."""
    return _entry(_compose(text, origin, lines=False), origin, lines=False)


def merge(below: dict[str, Entry], above: dict[str, Entry]) -> dict[str, Entry]:
    """Lay one tree over another: mappings merge key by key, every other value (lists too) is replaced whole."""
    merged = dict(below)
    for key, entry in above.items():
        old = merged.get(key)
        if old is not None and isinstance(old.content, dict) and isinstance(entry.content, dict):
            entry = Entry(merge(old.content, entry.content), entry.origin)
        merged[key] = entry
    return merged
