"""Hugging Face ``datasets``: from the hub, saved on disk, or parquet files, with images in columns."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hive_ds.data.schema import Sample
from hive_ds.data.sources.base import Columns, build_sample, describe_origin, read_images
from hive_ds.data.sources.stores import open_store
from hive_ds.errors import HiveError

logger = logging.getLogger(__name__)

DATA_SUFFIXES = (".parquet", ".arrow", ".json")
"""Of the files that hold a dataset and say what it is."""
FILE_SUFFIXES = (*DATA_SUFFIXES, ".jsonl", ".csv", ".tsv", ".tar", ".zip")
"""What no name on the hub ends in."""
SPLITS = {
    **{name: "train" for name in ("train", "training")},
    **{name: "validation" for name in ("validation", "valid", "val", "dev")},
    **{name: "test" for name in ("test", "testing", "eval", "evaluation")},
}
"""Of files and folders: what they are called, as ``datasets`` has it, by the split's name."""
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary")


class HuggingFaceSource:
    """Rows of a dataset; image columns hold encoded files, or paths below ``images``.

    The caption of a class label is the class's name.

    Args:
        name: a folder that `save_to_disk` wrote, a folder of .parquet files or one such file, or a name on the hub.
        split: of a dataset with several; default "train" where there is one.
        images: folder, zip or tar of images that a column names by path.
        columns: names of the columns.
    """

    def __init__(
        self, name: str, *, split: str | None = None, images: str | Path | None = None, columns: Columns | None = None
    ) -> None:
        self._rows = undecoded(_load(name, split))
        if not len(self._rows):
            raise HiveError(f"dataset {name}: holds no row")
        self._columns = (columns or Columns()).resolve(self._rows.column_names, f"dataset {name}")
        self._ids = self._rows.select_columns(self._columns.id) if self._columns.id else None
        self._classes = _class_names(self._rows, self._columns.text, f"dataset {name}")
        self._store = None if images is None else open_store(images)
        path = Path(name)
        files = sorted(file for file in path.rglob("*") if file.suffix in DATA_SUFFIXES) or [path]
        self.origin = {
            **describe_origin(
                "huggingface", name, self._columns, files=files if path.exists() else [], images=images, split=split
            ),
            "source revision": None if path.exists() else _revision(self._rows),
        }

    def __len__(self) -> int:
        return len(self._rows)

    def sample_id(self, index: int) -> str:
        """The id column, or the row's number."""
        return self._id(index, {} if self._ids is None else self._ids[index])

    def read(self, index: int) -> Sample:
        """Sample of row ``index``."""
        row = self._rows[index]
        text = self._columns.text
        if self._classes:
            row = {**row, text: self._classes.get(row[text], row[text])}
        return build_sample(self._id(index, row), row, self._columns, self._read_image)

    def images(self, index: int) -> tuple[bytes, ...]:
        """Images of row ``index``."""
        return read_images(self._rows[index], self._columns, self._read_image)

    def _id(self, index: int, row: dict[str, Any]) -> str:
        given = row.get(self._columns.id or "")
        return f"row-{index}" if given in (None, "") else str(given)

    def _read_image(self, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        data = value.get("bytes") if isinstance(value, dict) else None
        if data is not None:
            return bytes(data)
        path = value.get("path") if isinstance(value, dict) else value
        if path is None:
            raise HiveError("image holds neither bytes nor a path")
        if self._store is None:
            raise HiveError(f"image {path}: is a path, and no images were given (--images)")
        return self._store.read(path)


def load_splits(name: str, *, splits_by_file: bool = False) -> dict[str, Any]:
    """Every split of a dataset, one called "train" where it has none.

    Args:
        name: a folder that ``save_to_disk`` wrote, a folder of .parquet files or one such file, or a name on the hub.
        splits_by_file: ``datasets`` reads the splits of a folder of .parquet off its files' names; else they are
            splits where all of them name one (`SPLITS`), and "train" otherwise.

    Raises:
        HiveError: it does not load.
    """
    try:
        import datasets
    except ImportError as error:
        raise HiveError(f"dataset {name}: needs datasets ({error}): pip install 'hive-ds[datasets]'") from None
    path = Path(name)
    if not path.exists():
        _refuse_path(path)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
        elif path.is_dir() and splits_by_file:
            loaded = datasets.load_dataset(name)
        elif path.exists():
            loaded = datasets.load_dataset("parquet", data_files=_by_split(path) if path.is_dir() else [name])
        else:
            with _quiet_hub():
                loaded = datasets.load_dataset(name)
    except Exception as error:  # what it raises differs from version to version
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        failed = "does not load" if path.exists() else "neither a file or folder here nor reachable on the hub"
        raise HiveError(f"dataset {name}: {failed} ({reason})") from error
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def _by_split(folder: Path) -> dict[str, list[str]]:
    """The .parquet files of ``folder`` by the split that name or folder of each says, as ``test-00000-of-00001``.

    ``datasets`` looks at all files of the folder: an eval-notes.txt beside 0.parquet, and it finds no data.
    """
    found: dict[str, list[str]] = {}
    files = sorted(folder.rglob("*.parquet"))
    for file in files:
        words = [
            word for part in reversed(file.relative_to(folder).parts) for word in re.findall("[a-z]+", part.lower())
        ]
        found.setdefault(next((SPLITS[word] for word in words if word in SPLITS), ""), []).append(str(file))
    return found if found and "" not in found else {"train": list(map(str, files))}


def _refuse_path(path: Path) -> None:
    """HiveError where ``path``, which does not exist, is no name on the hub; asking there takes half a minute."""
    if path.is_absolute() or len(path.parts) > 2 or path.suffix in FILE_SUFFIXES:
        raise HiveError(f"dataset {path}: no such file or folder")
    if len(path.parts) == 2 and Path(path.parts[0]).is_dir():
        raise HiveError(
            f"dataset {path}: no such file or folder (the hub is not asked, for the folder {path.parts[0]} is here)"
        )


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub client's report of each try off the terminal."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(name: str, split: str | None) -> Any:
    loaded = load_splits(name)
    chosen = split or ("train" if "train" in loaded else None)
    if chosen is None or chosen not in loaded:
        raise HiveError(f"dataset {name}: has no split {split or 'train'!r}; name one of {', '.join(loaded)} (--split)")
    if split is None and len(loaded) > 1:
        logger.warning("dataset %s: takes split %r of %s (--split)", name, chosen, ", ".join(loaded))
    return loaded[chosen]


def _revision(rows: Any) -> str:
    """What tells one commit of a dataset on the hub from another: ``datasets`` names the folder of its cache so."""
    return ", ".join(sorted({Path(file["filename"]).parent.name for file in rows.cache_files}))


def _class_names(rows: Any, column: str | None, where: str) -> dict[int, str]:
    """Captions by class of a ``column`` of class labels, none of a column of text; HiveError for any other."""
    from datasets import ClassLabel

    feature = rows.features[column] if column else None
    if isinstance(feature, ClassLabel):
        return {number: name.replace("_", " ") for number, name in enumerate(feature.names)}
    kind = getattr(getattr(feature, "feature", feature), "dtype", TEXT_TYPES[0])
    if kind not in TEXT_TYPES:
        raise HiveError(
            f"{where}: column {column!r} holds {kind}, expected text; name one of {', '.join(rows.column_names)} with "
            "--text-column"
        )
    return {}


def undecoded(rows: Any) -> Any:
    """Return the dataset with its images left as encoded files, and plain values whatever format it was saved with."""
    from datasets import Image, Sequence

    rows = rows.with_format(None)
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, Sequence(Image(decode=False)))
    return rows
