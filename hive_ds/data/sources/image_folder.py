"""A folder of images: captions from a metadata file, from a text file beside each image, or its class folder's name."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hive_ds.data.schema import Sample
from hive_ds.data.sources.base import Columns, build_sample, describe_origin
from hive_ds.data.sources.stores import FolderStore
from hive_ds.data.sources.table import CSV_LARGEST_FIELD
from hive_ds.data.sources.webdataset import IMAGE_SUFFIXES
from hive_ds.errors import HiveError

METADATA = ("metadata.jsonl", "metadata.csv")


class ImageFolderSource:
    """Images below a folder, by path.

    The caption of ``cats/one.jpg`` is its row in metadata.jsonl or metadata.csv at the folder's root (``file_name`` and
    a column of text, as Hugging Face's ImageFolder has it), else what ``cats/one.txt`` says, else ``cats``.
    """

    def __init__(self, folder: str | Path, columns: Columns | None = None) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise HiveError(f"image folder {self._folder}: does not exist")
        paths = (Path(at, name) for at, _, names in os.walk(self._folder, followlinks=True) for name in names)
        self._names = sorted(
            str(path.relative_to(self._folder)) for path in paths if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES
        )
        if not self._names:
            raise HiveError(f"image folder {self._folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
        self._store = FolderStore(self._folder)
        path = next((self._folder / name for name in METADATA if (self._folder / name).is_file()), None)
        if columns and not columns.texts:
            path = None
        self._rows = _metadata(path) if path else {}
        self._columns = Columns(None, "file_name", "caption")
        if self._rows:
            names = list(next(iter(self._rows.values())))
            self._columns = (columns or Columns(image="file_name")).resolve(names, f"metadata of {self._folder}")
        self.origin = {
            **describe_origin("image_folder", str(folder), self._columns, files=[path] if path else []),
            "image names": hashlib.sha256("\n".join(self._names).encode(errors="surrogateescape")).hexdigest(),
        }

    def __len__(self) -> int:
        return len(self._names)

    def sample_id(self, index: int) -> str:
        """The image's path below the folder."""
        return self._names[index]

    def read(self, index: int) -> Sample:
        """Sample ``index``."""
        name = self._names[index]
        fields = self._rows.get(name) if self._rows else self._caption(name)
        if fields is None:
            raise HiveError("is not in the folder's metadata file")
        return build_sample(name, fields, self._columns, self._store.read)

    def images(self, index: int) -> tuple[bytes, ...]:
        """The image, the only one of sample ``index``."""
        return (self._store.read(self._names[index]),)

    def _caption(self, name: str) -> dict[str, Any]:
        text = (self._folder / name).with_suffix(".txt")
        if text.is_file():
            return {"file_name": name, "caption": text.read_bytes()}
        if "/" not in name:
            raise HiveError(
                "has no caption: no metadata file, no .txt beside it, and it lies in no class folder; let a "
                "captioner write it (hive-ds data recaption), and give its file with --captions"
            )
        return {"file_name": name, "caption": Path(name).parent.name.replace("_", " ")}


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a metadata file by file name."""
    csv.field_size_limit(CSV_LARGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
        return {str(row["file_name"]): row for row in rows}
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise HiveError(f"{path}: expected rows with file_name and a text ({error!r})") from error
