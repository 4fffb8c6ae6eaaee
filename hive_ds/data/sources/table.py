"""CSV and TSV files of image paths and captions."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hive_ds.data.schema import Sample
from hive_ds.data.sources.base import USUAL, Columns, build_sample, describe_origin, read_images
from hive_ds.data.sources.stores import open_store
from hive_ds.errors import HiveError

CSV_LARGEST_FIELD = 1 << 24
"""Bytes. Python's default of 128 KiB is less than some conversations."""


class TableSource:
    """Rows with an image path and a caption (or a JSON of conversations), with a header or in that order.

    Args:
        path: .csv or .tsv, UTF-8; commas or tabs between fields, whichever its first line has.
        images: folder, zip or tar that the paths start at; default the file's own folder.
        columns: names in the header.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None, columns: Columns = USUAL) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise HiveError(f"table {self._path}: does not exist")
        try:
            with self._path.open(newline="", encoding="utf-8-sig") as file:
                delimiter = _delimiter(self._path, file.readline())
                file.seek(0)
                reader = csv.reader(file, delimiter=delimiter, strict=True)
                rows = [row for row in strict_rows(reader, f"table {self._path}") if row]
        except UnicodeDecodeError as error:
            raise HiveError(f"table {self._path}: cannot be read ({error})") from error
        if not rows:
            raise HiveError(f"table {self._path}: holds no row")
        usual = {*Columns.USUAL_TEXT, *Columns.USUAL_IMAGE, *Columns.USUAL_CONVERSATIONS}
        if usual & {name.lower() for name in rows[0]} or {columns.text, columns.image} & set(rows[0]):
            self._names, self._rows = rows[0], rows[1:]
        elif len(rows[0]) == 1:
            raise HiveError(
                f"table {self._path}: line {rows[0][0][:80]!r} has one field; expected commas or tabs between"
            )
        else:
            self._names, self._rows = ["image", "caption", *map(str, range(2, len(rows[0])))], rows
        if twice := sorted({name for name in self._names if self._names.count(name) > 1}):
            raise HiveError(f"table {self._path}: names column {twice[0]!r} more than once; expected each once")
        self._columns = columns.resolve(self._names, f"table {self._path}")
        self.origin = describe_origin("table", str(path), self._columns, files=[path], images=images)
        self._store = open_store(images if images is not None else self._path.parent)

    def __len__(self) -> int:
        return len(self._rows)

    def sample_id(self, index: int) -> str:
        """The id column, the image's path, or the row's number."""
        row = dict(zip(self._names, self._rows[index], strict=False))
        return (self._columns.id and row.get(self._columns.id)) or row.get(self._columns.image or "") or f"row-{index}"

    def read(self, index: int) -> Sample:
        """Sample of row ``index``."""
        return build_sample(self.sample_id(index), self._fields(index), self._columns, self._store.read)

    def images(self, index: int) -> tuple[bytes, ...]:
        """Images of row ``index``."""
        return read_images(self._fields(index), self._columns, self._store.read)

    def _fields(self, index: int) -> dict[str, str]:
        row = self._rows[index]
        if len(row) != len(self._names):
            raise HiveError(f"has {len(row)} fields; expected {len(self._names)}: {', '.join(self._names)}")
        return dict(zip(self._names, row, strict=True))


def strict_rows(reader: Any, where: str, *, line: int = 1) -> Iterator[Any]:
    """Rows, from ``line`` on, of a csv reader made with ``strict=True``; HiveError names one whose quotes are loose.

    The reader is a `csv.reader` or a `csv.DictReader`.
    Python's reader is lenient by default: all up to the next mark, whole rows included, would be one field.
    """
    csv.field_size_limit(CSV_LARGEST_FIELD)
    try:
        for row in reader:
            line = reader.line_num + 1
            yield row
    except csv.Error as error:
        raise HiveError(
            f"{where}: the row that begins in line {line} cannot be read ({error}); a text that begins with a "
            "quotation mark, or spans lines, stands between two of them, and those inside are doubled"
        ) from error


def _delimiter(path: Path, line: str) -> str:
    """What separates the fields of the table at ``path``, whose first line is ``line``."""
    if path.suffix == ".tsv":
        return "," if "," in line and "\t" not in line else "\t"
    return "\t" if "\t" in line.split(",")[0] else ","  # a caption after the first field may hold either
