"""WebDataset shards: tar files whose members of one stem are one sample (as img2dataset writes them)."""

from __future__ import annotations

import json
from glob import glob
from pathlib import Path
from typing import Any

from hive_ds.data.schema import Sample
from hive_ds.data.sources.base import Columns, build_sample, describe_origin
from hive_ds.data.sources.stores import Member, read_span, tar_members
from hive_ds.errors import HiveError

IMAGE_SUFFIXES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "img")
"""Of files that are taken for images. What Pillow cannot decode (heic) is rejected, and not passed over."""


class WebDatasetSource:
    """Samples of ``key.jpg`` + ``key.txt`` and/or ``key.json`` in the .tar files of a folder or glob pattern.

    The caption is ``key.txt`` unless a text column names a field of ``key.json``; ``conversations`` in the JSON wins
    over ``key.txt``.
    """

    def __init__(self, pattern: str | Path, columns: Columns | None = None) -> None:
        path = Path(pattern)
        names = sorted(map(str, path.glob("*.tar"))) if path.is_dir() else sorted(glob(str(pattern)))
        if not names:
            raise HiveError(f"WebDataset {pattern}: no .tar file there")
        self._columns = columns or Columns()
        self._tars = [Path(name) for name in names]
        self.origin = describe_origin("webdataset", str(pattern), self._columns, files=self._tars)
        self._samples: list[tuple[int, str, list[Member]]] = []
        for number, tar in enumerate(self._tars):
            self._samples += [(number, key, members) for key, members in _by_key(tar).items()]
        if not self._samples:
            raise HiveError(f"WebDataset {pattern}: its {len(names)} tar files hold no files")

    def __len__(self) -> int:
        return len(self._samples)

    def sample_id(self, index: int) -> str:
        """Shard and key: keys alone may repeat from shard to shard."""
        number, key, _ = self._samples[index]
        return f"{self._tars[number].stem}/{key}"

    def read(self, index: int) -> Sample:
        """Sample ``index``."""
        tar, files = self._files(index)
        fields: dict[str, Any] = _json_fields(read_span(tar, files["json"])) if "json" in files else {}
        if "txt" in files:
            fields["txt"] = read_span(tar, files["txt"])
        fields["image"] = _images(files)
        given = Columns(None, "image", self._columns.text, self._columns.conversations)
        if not given.text and "txt" in fields and "conversations" not in fields:
            given = Columns(None, "image", "txt")
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
    except ValueError as error:
        raise HiveError(f"its .json is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise HiveError(f"its .json holds a {type(fields).__name__}, expected an object with fields")
    return fields
