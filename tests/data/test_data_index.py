"""An index.json whose values are not what streaming writes: named before the first step, local or remote."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from test_data_mds import folder, loader, own_temporary_folder  # noqa: F401 (fixtures)

from hive_ds.data.mds.reading import open_folder
from hive_ds.errors import HiveError

WRONG: dict[str, tuple[Any, str]] = {
    "version": (3, "version is 3, expected 2"),
    "format": ("json", "format is 'json', expected 'mds'"),
    "samples": (True, "samples is True, expected a whole number"),
    "column_names": (None, "column_names is None, expected a list of names"),
    "column_names/0": ([], r"column_names is \[\[\], "),
    "column_names/1": ("id", r"has column_names \['id', 'id', .*, expected one of each a column"),
    "column_encodings/1": (7, r"column_encodings is \['str', 7, "),
    "column_encodings/2": (
        "pkl",
        r"column_encodings is \[.*'pkl'.* expected a list of types that streaming knows, none of them pickled",
    ),
    "column_encodings/4": ("str", "has columns .*, expected 'turns' of type json and size null"),
    "column_sizes/0": ("x", r"column_sizes is \['x', "),
    "column_sizes/3": (8, "has columns .*, expected 'meta' of type json and size null"),
    "size_limit": (0, "size_limit is 0, expected a whole number above 0, or null"),
    "raw_data": ([], r"raw_data is \[\], expected a file's name, bytes and hashes"),
    "raw_data/basename": ("../x", "raw_data: basename is '../x', expected the name of a file in the folder"),
    "raw_data/bytes": (-7, "raw_data: bytes is -7, expected a whole number"),
    "raw_data/size": (7, "raw_data: has size, expected basename, bytes, hashes"),
    "zip_data/hashes": ({}, "zip_data: has no basename, expected basename, bytes, hashes"),
}


def put(index: dict[str, Any], place: str, value: Any) -> str:
    """JSON of ``index`` with ``value`` at ``place`` of its first shard."""
    *outer, last = place.split("/")
    index = copy.deepcopy(index)
    found = index["shards"][0]
    for key in outer:
        found[key] = found[key] or {}
        found = found[key]
    found[int(last) if isinstance(found, list) else last] = value
    return json.dumps(index)


REMOTE = ("version", "column_sizes/0")
"""What streaming's reader takes as it is, and what it does not."""


@pytest.mark.parametrize(
    ("place", "prefix"), [*((place, "") for place in WRONG), *((place, "file://") for place in REMOTE)]
)
def test_a_wrong_value_is_named(place: str, prefix: str, folder: str, tmp_path: Path) -> None:  # noqa: F811
    index = json.loads(Path(folder, "index.json").read_text())
    Path(tmp_path, "data").mkdir()
    value, message = WRONG[place]
    Path(tmp_path, "data", "index.json").write_text(put(index, place, value))
    with pytest.raises(HiveError, match=f"^data folder {prefix}{tmp_path}/data: .*index.json: shard 0:? {message}"):
        loader(f"{prefix}{tmp_path}/data", cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["/x", "a/../../x", ".", "", "a\0b", 7])
def test_a_shard_outside_the_folder_or_without_a_name(name: object, folder: str, tmp_path: Path) -> None:  # noqa: F811
    index = json.loads(Path(folder, "index.json").read_text())
    (tmp_path / "index.json").write_text(put(index, "raw_data/basename", name))
    with pytest.raises(HiveError, match=r"shard 0: raw_data: basename is .*, expected the name of a file in the fold"):
        open_folder(tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("{}")
    with pytest.raises(HiveError, match=f"^data folder {tmp_path}/data: is a file; expected a folder of MDS shards"):
        open_folder(tmp_path / "data")


def test_shards_are_written_with_their_digests(folder: str) -> None:  # noqa: F811
    """By which a copy is checked."""
    [shard] = json.loads(Path(folder, "index.json").read_text())["shards"]
    data = Path(folder, "shard.00000.mds").read_bytes()
    digests = {"sha256": hashlib.sha256(data).hexdigest()}
    assert shard["raw_data"] == {"basename": "shard.00000.mds", "bytes": len(data), "hashes": digests}


def test_more_samples_than_bytes_for_them(folder: str, tmp_path: Path) -> None:  # noqa: F811
    """streaming makes room for as many as are listed."""
    index = json.loads(Path(folder, "index.json").read_text())
    (tmp_path / "index.json").write_text(put(index, "samples", 10**9))
    most = index["shards"][0]["raw_data"]["bytes"] // 4
    message = f"shard 0: samples is 1000000000, expected at most a quarter of raw_data's bytes, {most}$"
    for use in (loader, open_folder):
        with pytest.raises(HiveError, match=message):
            use(str(tmp_path))
