"""Hugging Face ``datasets``: from the hub, saved on disk, or parquet files, with images in columns."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from hive_ds.data.schema import Sample
from hive_ds.data.sources.base import USUAL, Columns, build_sample, describe_origin, read_images
from hive_ds.data.sources.stores import files_below, open_store
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
        self, name: str, *, split: str | None = None, images: str | Path | None = None, columns: Columns = USUAL
    ) -> None:
        self._rows = undecoded(_load(name, split))
        if not len(self._rows):
            raise HiveError(f"dataset {name}: holds no row")
        self._columns = columns.resolve(self._rows.column_names, f"dataset {name}")
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
        return image_file(value, self._read_path)

    def _read_path(self, path: Any) -> bytes:
        if self._store is None:
            raise HiveError(f"image {path}: is a path, and no images were given (--images)")
        return self._store.read(path)


def image_file(value: Any, read_path: Callable[[Any], bytes]) -> bytes:
    """The encoded image that a column of an `undecoded` dataset holds; ``read_path`` reads one that it names."""
    if isinstance(value, bytes):
        return value
    fields = value if isinstance(value, Mapping) else {"path": value}
    if fields.get("bytes") is not None:
        return bytes(fields["bytes"])
    if fields.get("path") is None:
        raise HiveError("image holds neither bytes nor a path")
    return read_path(fields["path"])


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote it."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def holds_dataset(folder: Path) -> bool:
    """Whether it is a folder that ``datasets`` reads: one that ``save_to_disk`` wrote, or one of .parquet files."""
    return is_saved_dataset(folder) or any(_parquet_files(folder))


def _parquet_files(folder: Path) -> Iterator[Path]:
    return (file for file in map(Path, files_below(folder)) if file.suffix.lower() == ".parquet")


def load_splits(name: str) -> dict[str, Any]:
    """Every split of a dataset, one called "train" where it has none; HiveError where it does not load.

    ``name`` is a folder that ``save_to_disk`` wrote, a folder of .parquet files or one such file, or a name on the hub.
    """
    try:
        import datasets
    except ImportError as error:
        raise HiveError(f"dataset {name}: needs datasets ({error}): pip install 'hive-ds[datasets]'") from None
    path = Path(name)
    if not path.exists():
        _refuse_path(path)
    try:
        if is_saved_dataset(path):
            loaded = datasets.load_from_disk(name)
        elif path.exists():
            files = _by_split(path) if path.is_dir() else {"train": [name]}
            # They are taken for patterns, and a name may hold brackets.
            literal = {split: [escape(file) for file in found] for split, found in files.items()}
            loaded = datasets.load_dataset("parquet", data_files=literal)
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

    All are "train" where one says none, or none says a usual one (`SPLITS`). ``datasets`` itself looks at all files of
    the folder: an eval-notes.txt beside 0.parquet, and it finds no data; and it leaves out files that say none.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(_parquet_files(folder)):
        words = [word for part in reversed(file.parts) for word in re.findall("[a-z]+", part.lower())]
        other = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}", file.stem)
        split = next((SPLITS[word] for word in words if word in SPLITS), other[1] if other else "")
        found.setdefault(split, []).append(str(folder / file))
    if "" in found or not set(SPLITS.values()) & set(found):
        return {"train": sorted(file for files in found.values() for file in files)}
    return found


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
