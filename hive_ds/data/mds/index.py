"""The index of a folder of MDS shards, looked at value by value before streaming takes it as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from streaming.base.format.mds.encodings import is_mds_encoding, is_mds_encoding_safe

from hive_ds.data.schema import MDS_COLUMNS
from hive_ds.errors import HiveError
from hive_ds.names import does_not_exist

INDEX = "index.json"
SHOWN = 120
"""Characters of a value that a message quotes."""


class Rule(NamedTuple):
    """Whether a value of the index can be used, and what is expected of it."""

    holds: Callable[[Any], bool]
    expected: str


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_name(value: Any) -> bool:
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_encoding(value: Any) -> bool:
    """Not a pickled column's, which runs code when it is read."""
    return isinstance(value, str) and is_mds_encoding(value) and is_mds_encoding_safe(value)


def _or_null(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


FILE = {
    "basename": Rule(_is_name, "the name of a file in the folder"),
    "bytes": Rule(_is_count, "a whole number"),
    "hashes": Rule(lambda value: isinstance(value, dict) and all(map(_is_text, value.values())), "digests by name"),
}
SHARD = {
    "version": Rule(lambda value: value == 2, "2"),
    "format": Rule(lambda value: value == "mds", "'mds'"),
    "samples": Rule(_is_count, "a whole number"),
    "column_names": Rule(_list_of(_is_text), "a list of names"),
    "column_encodings": Rule(_list_of(_is_encoding), "a list of types that streaming knows, none of them pickled"),
    "column_sizes": Rule(_list_of(_or_null(_is_count)), "a list of whole numbers, or null"),
    "compression": Rule(_or_null(_is_text), "a name, or null"),
    "hashes": Rule(_list_of(_is_text), "a list of names"),
    "size_limit": Rule(_or_null(lambda value: _is_count(value) and value > 0), "a whole number above 0, or null"),
    "raw_data": Rule(lambda value: isinstance(value, dict), "a file's name, bytes and hashes"),
    "zip_data": Rule(
        lambda value: value is None or isinstance(value, dict), "a file's name, bytes and hashes, or null"
    ),
}
"""Values of an entry by key, as streaming writes them."""


def read_index(folder: str | Path, name: str | Path | None = None) -> list[dict[str, Any]]:
    """Entries of the shards of the local ``folder``, which streaming's reader can be made of.

    HiveError, naming the folder (or ``name``) and the key and value at fault, where there is none or it cannot be used.
    """
    data, index = f"data folder {name or folder}", Path(folder) / INDEX
    if Path(folder).is_file():
        raise HiveError(f"{data}: is a file; expected a folder of MDS shards (hive-ds data convert)")
    if not Path(folder).is_dir():
        raise HiveError(f"{data}: {does_not_exist(str(folder))}")
    if not index.is_file():
        inside = ", ".join(sorted(path.parent.name for path in Path(folder).glob(f"*/{INDEX}")))
        expected = f"one of its folders {inside}" if inside else "MDS shards (hive-ds data convert)"
        raise HiveError(f"{data}: holds no {INDEX}; expected {expected}")
    where = f"{data}: {index if name else INDEX}"
    try:
        found = json.loads(index.read_bytes())
    except ValueError as error:
        raise HiveError(f"{where} cannot be read ({error})") from error
    if not isinstance(found, dict) or found.get("version") != 2 or not isinstance(found.get("shards"), list):
        raise HiveError(f"{where} is {found!r:.{SHOWN}}, expected version 2 and a list of shards")
    for number, entry in enumerate(found["shards"]):
        _check_entry(entry, f"{where}: shard {number}")
    shards: list[dict[str, Any]] = found["shards"]
    return shards


def _check_entry(entry: Any, where: str) -> None:
    _check_values(entry, SHARD, where)
    for key in ("raw_data", "zip_data"):
        if entry[key] is not None:
            _check_values(entry[key], FILE, f"{where}: {key}")
    names, kinds, sizes = (entry[f"column_{part}"] for part in ("names", "encodings", "sizes"))
    columns = dict(zip(names, zip(kinds, sizes, strict=False), strict=False))
    if not len(names) == len(kinds) == len(sizes) == len(columns):
        parts = f"column_names {names}, column_encodings {kinds} and column_sizes {sizes}"
        raise HiveError(f"{where} has {parts}, expected one of each a column")
    for column, kind in MDS_COLUMNS.items():
        if columns.get(column) != (kind, None):
            raise HiveError(f"{where} has columns {columns}, expected {column!r} of type {kind} and size null")
    most = entry["raw_data"]["bytes"] // 4  # a shard begins with 4 bytes a sample
    if entry["samples"] > most:
        raise HiveError(
            f"{where}: samples is {entry['samples']}, expected at most a quarter of raw_data's bytes, {most}"
        )


def _check_values(found: Any, rules: Mapping[str, Rule], where: str) -> None:
    if not isinstance(found, dict):
        raise HiveError(f"{where} is {found!r:.{SHOWN}}, expected {', '.join(rules)}")
    if found.keys() != rules.keys():
        key = min(found.keys() ^ rules.keys())
        raise HiveError(f"{where}: {'has no' if key in rules else 'has'} {key}, expected {', '.join(rules)}")
    for key, rule in rules.items():
        if not rule.holds(found[key]):
            raise HiveError(f"{where}: {key} is {found[key]!r:.{SHOWN}}, expected {rule.expected}")
