"""Classification data sets on disk or on the hub: class folders, and whatever Hugging Face ``datasets`` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hive_ds.data.sources.hugging_face import holds_dataset, image_file, load_splits, undecoded
from hive_ds.data.sources.stores import IMAGE_SUFFIXES, files_below, is_image
from hive_ds.errors import HiveError
from hive_ds.evaluation.probes.data import TASK, LabelledImages, ProbeData
from hive_ds.evaluation.probes.presets import PRESETS, Preset, find_preset

TEST_SPLITS = ("test", "validation", "val", "valid")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


@dataclass(frozen=True)
class DataOptions:
    """Which data; None: the preset's, or found.

    ``source`` is a folder of class folders (or of ``train`` and ``test`` folders of them), a folder or file that
    ``datasets`` reads, or a name: a preset's or the hub's. ``test_split`` "none" holds out ``test_share`` by seed.
    """

    source: str
    preset: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    test_share: float = 0.2


def open_data(options: DataOptions) -> ProbeData:
    """The training and test images of a data set; nothing is decoded yet.

    HiveError where it does not load, or a split or column is not there.
    """
    preset = find_preset_of(options)
    path = Path(options.source).expanduser()
    source = options.source
    if preset and not path.exists() and source in PRESETS:
        source = preset.hub_name
    splits: Mapping[str, Any]
    open_split: Callable[[str, Any], LabelledImages]
    if path.is_dir() and not holds_dataset(path):
        if options.image_column or options.label_column:
            raise HiveError(f"data {source}: is a folder of class folders, which have no columns")
        splits, open_split = _image_folders(path), _open_image_folder
    else:
        splits = load_splits(str(path) if path.exists() else source)
        image_column = options.image_column or (preset.image_column if preset else None)
        label_column = options.label_column or (preset.label_column if preset else None)
        open_split = partial(_open_dataset, image_column=image_column, label_column=label_column)
    train, test = _choose_splits(splits, options, preset)
    name = options.preset or path.name
    opened = {split: open_split(f"{name} {split}", splits[split]) for split in (train, test) if split is not None}
    return ProbeData(name, opened[train], opened[test] if test else None, options.test_share)


def find_preset_of(options: DataOptions) -> Preset | None:
    """The preset that is named, or whose name the source is."""
    if options.preset is not None:
        return find_preset(options.preset)
    return None if Path(options.source).exists() else PRESETS.get(options.source)


def _choose_splits(splits: Mapping[str, Any], options: DataOptions, preset: Preset | None) -> tuple[str, str | None]:
    """Names of the training and the test split; the preset's where the data has them, else the usual ones."""

    def choose(given: str | None, usual: tuple[str, ...]) -> str | None:
        if given is not None and given not in splits:
            raise HiveError(f"data {options.source}: has no split {given!r}; name one of {', '.join(splits)}")
        return given or next((name for name in usual if name in splits), None)

    first = (preset.train_split,) if preset else ()
    train = choose(options.train_split, (*first, "train", *(splits if len(splits) == 1 else ())))
    if train is None:
        raise HiveError(f"data {options.source}: has no split 'train'; name one of {', '.join(splits)}")
    if options.test_split == "none":
        return train, None
    test = choose(options.test_split, ((preset.test_split,) if preset else ()) + TEST_SPLITS)
    if test == train:
        raise HiveError(f"data {options.source}: split {train!r} cannot be both the training and the test images")
    return train, test


def _image_folders(root: Path) -> dict[str, Path]:
    """Split -> folder of class folders; one split "train" where ``root`` itself holds the classes."""
    train = root / "train"
    if train.is_dir() and any(entry.is_dir() for entry in train.iterdir()):  # else it may be a class of trains
        return {entry.name: entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    return {"train": root}


def _open_image_folder(name: str, folder: Path) -> LabelledImages:
    """Images below ``folder/CLASS``, classes and paths in order; the fingerprint is of paths, sizes and times."""
    paths = sorted(Path(name) for name in files_below(folder) if "/" in name and is_image(name))
    if not paths:
        raise HiveError(f"{name}: {folder} holds no CLASS/IMAGE ({', '.join(IMAGE_SUFFIXES)})")
    digest = hashlib.sha256()
    for path in paths:
        stat = (folder / path).stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    files = [folder / path for path in paths]
    return LabelledImages(
        name,
        digest.hexdigest(),
        len(files),
        partial(_read_file, files),
        partial(_describe_file, files),
        {TASK: [path.parts[0] for path in paths]},
    )


def _read_file(files: Sequence[Path], index: int) -> bytes:
    return files[index].read_bytes()


def _describe_file(files: Sequence[Path], index: int) -> str:
    return f"image {files[index]}"


def _open_dataset(name: str, rows: Any, *, image_column: str | None, label_column: str | None) -> LabelledImages:
    """Rows of a Hugging Face dataset; the fingerprint is the one that ``datasets`` keeps."""
    from datasets import Image

    if not len(rows):
        raise HiveError(f"{name}: holds no image")
    usual = [column for column, feature in rows.features.items() if isinstance(feature, Image)]
    image_column = _pick(name, rows, image_column, usual, "image")
    label_column = _pick(name, rows, label_column, LABEL_COLUMNS, "label")
    labels = _label_names(name, rows, label_column)
    images = undecoded(rows.select_columns([image_column]))
    return LabelledImages(
        name,
        str(images._fingerprint),
        len(rows),
        partial(_read_row, images, image_column),
        partial("{}, row {}".format, name),
        {TASK: labels},
    )


def _pick(name: str, rows: Any, given: str | None, usual: Any, what: str) -> str:
    found = given or next((column for column in usual if column in rows.column_names), None)
    if found not in rows.column_names:
        raise HiveError(
            f"{name}: has no {what} column{f' {given!r}' if given else ''}; name one of "
            f"{', '.join(rows.column_names)} with --{what}-column"
        )
    return str(found)


def _label_names(name: str, rows: Any, column: str) -> list[str | None]:
    """Class names; of ``ClassLabel`` by its own list, -1 (no label) as None."""
    names = getattr(rows.features[column], "names", None)
    values = list(rows[column])
    if any(isinstance(value, float) or not isinstance(value, (int, str, type(None))) for value in values):
        raise HiveError(f"{name}: column {column!r} holds {values[0]!r}, expected a class's name or number")
    return [
        None if value is None or value == -1 else names[value] if names and isinstance(value, int) else str(value)
        for value in values
    ]


def _read_row(rows: Any, column: str, index: int) -> bytes:
    return image_file(rows[index][column], lambda path: Path(str(path)).read_bytes())
