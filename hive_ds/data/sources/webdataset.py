"""WebDataset shards: tar files whose members of one stem are one sample (as img2dataset writes them)."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from hive_ds.data.schema import Sample
from hive_ds.data.sources.base import NONE, USUAL, Columns, build_sample, describe_origin
from hive_ds.data.sources.stores import IMAGE_SUFFIXES, Member, files_below, read_span, tar_members
from hive_ds.errors import HiveError

COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


class WebDatasetSource:
    """Samples of ``key.jpg`` + ``key.txt`` and/or ``key.json`` in the .tar files below a folder, or of a glob pattern.

    The caption is ``key.txt`` unless a text column names a field of ``key.json``; ``conversations`` in the JSON wins
    over ``key.txt``.
    """

    def __init__(self, pattern: str | Path, columns: Columns = USUAL) -> None:
        self._tars = _tars(Path(pattern))
        if not self._tars:
            raise HiveError(f"WebDataset {pattern}: no .tar file there")
        self._columns = columns
        self._shards = [tar.stem for tar in self._tars]
        if len(set(self._shards)) < len(self._shards):  # of several folders
            top = os.path.commonpath([tar.parent for tar in self._tars])
            self._shards = [str(tar.relative_to(top).with_suffix("")) for tar in self._tars]
        self.origin = describe_origin("webdataset", str(pattern), self._columns, files=self._tars)
        self._samples: list[tuple[int, str, list[Member]]] = []
        for number, tar in enumerate(self._tars):
            self._samples += [(number, key, members) for key, members in _by_key(tar).items()]
        if not self._samples:
            raise HiveError(f"WebDataset {pattern}: its {len(self._tars)} tar files hold no files")

    def __len__(self) -> int:
        return len(self._samples)

    def sample_id(self, index: int) -> str:
        """Shard and key: keys alone may repeat from shard to shard."""
        number, key, _ = self._samples[index]
        return f"{self._shards[number]}/{key}"

    def read(self, index: int) -> Sample:
        """Sample ``index``."""
        tar, files = self._files(index)
        fields: dict[str, Any] = _json_fields(read_span(tar, files["json"])) if "json" in files else {}
        if "txt" in files:
            fields["txt"] = read_span(tar, files["txt"])
        fields["image"] = _images(files)
        image = NONE if self._columns.image == NONE else "image"
        given = Columns(None, image, self._columns.text, self._columns.conversations)
        if not (given.text or given.conversations) and "txt" in fields and "conversations" not in fields:
            given = replace(given, text="txt")
        columns = given.resolve(list(fields), "its files")
        return build_sample(self.sample_id(index), fields, columns, lambda member: read_span(tar, member))

    def images(self, index: int) -> tuple[bytes, ...]:
        """Images of sample ``index``."""
        tar, files = self._files(index)
        return tuple(read_span(tar, member) for member in _images(files))

    def _files(self, index: int) -> tuple[Path, dict[str, Member]]:
        number, key, members = self._samples[index]
        tar = self._tars[number]
        files: dict[str, Member] = {}
        for member in members:
            first = files.setdefault(_suffix(member.name), member)
            if first is not member:
                places = " and ".join(f"{one.name} at byte {one.start}" for one in (first, member))
                raise HiveError(f"{tar.name}, key {key}: holds {places}; expected one file of a key and suffix")
        return tar, files


def _tars(pattern: Path) -> list[Path]:
    """The tar files below a folder, or of a pattern, by name; HiveError where a folder holds compressed ones."""
    if pattern.is_file():
        return [pattern]
    if not pattern.is_dir():
        return sorted(map(Path, glob(str(pattern))))
    files = sorted(pattern / name for name in files_below(pattern))
    for file in files:
        if file.suffix.lower() in COMPRESSED and (".tar." in file.name.lower() or file.suffix == ".tgz"):
            raise HiveError(
                f"WebDataset {pattern}: {file.name} is compressed; unpack it, or name the others by a pattern"
            )
    return [file for file in files if file.suffix.lower() == ".tar"]


def _images(files: dict[str, Member]) -> list[Member]:
    """The images among ``files``; HiveError where there are but such whose kind, as a mask's, is unknown."""
    images = [member for suffix, member in sorted(files.items()) if suffix in IMAGE_SUFFIXES]
    others = [suffix for suffix in files if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    if others and not images:
        raise HiveError(f"has images called {', '.join(others)} alone; expected a name of one suffix, as key.jpg")
    return images


def _by_key(tar: Path) -> dict[str, list[Member]]:
    groups: dict[str, list[Member]] = {}
    for member in tar_members(tar):
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        key = name.split(".", 1)[0]
        if key:
            groups.setdefault(f"{folder}/{key}" if folder else key, []).append(member)
    return groups


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _json_fields(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HiveError(f"its .json is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise HiveError(f"its .json holds a {type(fields).__name__}, expected an object with fields")
    return fields
