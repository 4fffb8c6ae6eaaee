"""A folder of images: captions from a metadata file, from a text file beside each image, or its class folder's name."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hive_ds.data.schema import Sample
from hive_ds.data.sources.base import USUAL, Columns, build_sample, describe_origin
from hive_ds.data.sources.stores import IMAGE_SUFFIXES, FolderStore, files_below, is_image
from hive_ds.data.sources.table import strict_rows
from hive_ds.errors import HiveError

METADATA = ("metadata.jsonl", "metadata.csv")
"""Of a folder that holds both, the first is read."""
Row = dict[Any, Any]


class ImageFolderSource:
    """Images below a folder, by path; hidden files and folders are left out.

    The caption of ``cats/one.jpg`` is its row in a metadata.jsonl or metadata.csv (a column of text and ``file_name``,
    which starts at the metadata's own folder, as Hugging Face's ImageFolder has it), else what ``cats/one.txt`` says,
    else, where no image of the folder has such a text, ``cats``. Each row is a sample: an image of several rows is
    several, and a row without image or an image without row cannot be used.
    """

    def __init__(self, folder: str | Path, columns: Columns = USUAL) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise HiveError(f"image folder {self._folder}: does not exist")
        files = list(files_below(self._folder))
        names = sorted(filter(is_image, files))
        if not names:
            raise HiveError(f"image folder {self._folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
        self._store = FolderStore(self._folder)
        texts = {name for name in files if name.endswith(".txt")}
        self._with_texts = {Path(name).parent for name in names if str(Path(name).with_suffix(".txt")) in texts}
        tables = [] if not columns.texts else _metadata_files(self._folder, files)
        rows = [row for table in tables for row in _metadata(self._folder, table)]
        self._samples: list[tuple[str, Row | None]] = [(name, None) for name in names]
        self._columns = Columns(None, "file_name", "caption")
        self._has_metadata = bool(rows)
        asked = columns.text or columns.conversations or columns.image
        if asked and columns.texts and not rows:
            raise HiveError(
                f"image folder {self._folder}: has no column {asked!r}; expected a {' or '.join(METADATA)} with it"
            )
        if rows:
            without = set(names) - {name for name, _ in rows}
            self._samples = sorted([*rows, *((name, None) for name in without)], key=lambda sample: sample[0])
            fields = list(dict.fromkeys(field for _, row in rows for field in row if field is not None))
            self._columns = replace(columns, image=columns.image or "file_name").resolve(
                fields, f"metadata of {self._folder}"
            )
        self.origin = {
            **describe_origin("image_folder", str(folder), self._columns, files=tables),
            "image names": hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest(),
        }

    def __len__(self) -> int:
        return len(self._samples)

    def sample_id(self, index: int) -> str:
        """The image's path below the folder."""
        return self._samples[index][0]

    def read(self, index: int) -> Sample:
        """Sample ``index``."""
        name, row = self._samples[index]
        if row is None:
            if self._has_metadata:
                raise HiveError("is not in the folder's metadata file")
            row = self._caption(name)
        if None in row:  # where csv's reader puts what is too much
            raise HiveError(
                f"has {len(row) - 1 + len(row[None])} fields; expected {len(row) - 1}: quote a text that holds commas"
            )
        return build_sample(name, row, self._columns, lambda _: self._store.read(name))

    def images(self, index: int) -> tuple[bytes, ...]:
        """The image, the only one of sample ``index``."""
        return (self._store.read(self._samples[index][0]),)

    def _caption(self, name: str) -> Row:
        text = (self._folder / name).with_suffix(".txt")
        if text.is_file():
            return {"file_name": name, "caption": text.read_bytes()}
        if Path(name).parent in self._with_texts:
            raise HiveError(f"has no {text.name} beside it, as other images of its folder have")
        if "/" not in name:
            raise HiveError(
                "has no caption: no metadata file, no .txt beside it, and it lies in no class folder; let a "
                "captioner write it (hive-ds data recaption), and give its file with --captions"
            )
        return {"file_name": name, "caption": Path(name).parent.name.replace("_", " ")}


def _metadata_files(folder: Path, files: list[str]) -> list[Path]:
    """The metadata files among ``files``, one a folder."""
    found: dict[Path, Path] = {}
    for kind in METADATA:
        for name in sorted(name for name in files if Path(name).name == kind):
            found.setdefault(Path(name).parent, folder / name)
    return list(found.values())


def _metadata(folder: Path, path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a metadata file, each with the path of its image below ``folder``."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows: list[Row] = list(strict_rows(csv.DictReader(file, strict=True), str(path), line=2))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
        for row in rows:
            yield os.path.normpath(path.parent.relative_to(folder) / str(row["file_name"])), row
    except (ValueError, KeyError, TypeError) as error:
        raise HiveError(f"{path}: expected rows with file_name and a text ({error!r})") from error
