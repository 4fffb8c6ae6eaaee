"""LLaVA's format: a JSON list or JSONL of conversations, and images in a folder, a zip or a tar."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from hive_ds.data.schema import Sample
from hive_ds.data.sources.base import USUAL, Columns, build_sample, describe_origin, read_images
from hive_ds.data.sources.stores import ImageStore, open_store
from hive_ds.errors import HiveError


class LlavaSource:
    """Rows of ``{"id", "image", "conversations": [{"from", "value"}, ...]}``, or with a caption in place of the last.

    ``image`` is a name in ``images``, a list of them, or absent; a row may call it ``images`` where others do not.
    HiveError for a missing or malformed file.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None, columns: Columns = USUAL) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise HiveError(f"LLaVA JSON {self._path}: does not exist")
        self._store: ImageStore | None = None if images is None else open_store(images)
        self._rows = _JsonLines(self._path) if self._path.suffix.lower() == ".jsonl" else _json_list(self._path)
        first = [row for row in (self._rows[i] for i in range(min(100, len(self._rows)))) if _is_row(row)]
        if not first:
            raise HiveError(f"LLaVA JSON {self._path}: none of its first rows is an object with fields")
        names = list(dict.fromkeys(name for row in first for name in row))  # the first may be a text-only row
        if not columns.image and not set(Columns.USUAL_IMAGE) & {name.lower() for name in names}:
            if images is not None:
                raise HiveError(
                    f"LLaVA JSON {self._path}: no image in its first rows, whose fields are {', '.join(names)}; name "
                    "the one that holds them with --image-column, or leave --images out"
                )
            names.append("image")  # which a later row may have
        self._image_is_named = bool(columns.image)
        self._columns = columns.resolve(names, f"LLaVA JSON {self._path}")
        self.origin = describe_origin("llava", str(path), self._columns, files=[path], images=images)

    def __len__(self) -> int:
        return len(self._rows)

    def sample_id(self, index: int) -> str:
        """The row's id, or one made of its number."""
        row = self._rows[index]
        given = row.get(self._columns.id or "id") if _is_row(row) else None
        return f"entry-{index}" if given in (None, "") else str(given)

    def read(self, index: int) -> Sample:
        """Sample of row ``index``."""
        return build_sample(self.sample_id(index), self._row(index), self._columns, self._read_image)

    def images(self, index: int) -> tuple[bytes, ...]:
        """Images of row ``index``."""
        return read_images(self._row(index), self._columns, self._read_image)

    def _row(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if not isinstance(row, dict):
            raise HiveError(f"is {str(row)[:80]!r}, expected an object with fields")
        image = self._columns.image
        if self._image_is_named or image is None or row.get(image):
            return row
        others = (row[name] for name in row if name.lower() in ("image", "images"))
        return {**row, image: next((value for value in others if value), None)}

    def _read_image(self, name: Any) -> bytes:
        if self._store is None:
            raise HiveError(f"image {name}: no images were given; expected a folder, a .zip or a .tar (--images)")
        return self._store.read(name)


def _is_row(row: Any) -> bool:
    return isinstance(row, dict)


def _json_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise HiveError(f"LLaVA JSON {path}: is not JSON ({error}); one object a line is a .jsonl") from error
    if not isinstance(rows, list):
        raise HiveError(f"LLaVA JSON {path}: holds a {type(rows).__name__}, expected a list of samples")
    if not rows:
        raise HiveError(f"LLaVA JSON {path}: the list is empty, expected one sample at least")
    return rows


class _JsonLines:
    """Lines of a JSONL file, read when asked: only where they start is kept. A broken line is the text it holds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("Q")
        position = 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    self._starts.append(position)
                position += len(line)
        if not self._starts:
            raise HiveError(f"LLaVA JSON {path}: holds no line, expected one sample at least")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            return json.loads(line)
        except (ValueError, RecursionError):  # the latter where it is nested without end
            return line.decode(errors="replace").strip()
