"""Which format a source has, and the presets of well-known data sets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hive_ds.data.sources.base import NONE, USUAL, Columns, Source
from hive_ds.data.sources.hugging_face import HuggingFaceSource, holds_dataset
from hive_ds.data.sources.image_folder import METADATA, ImageFolderSource
from hive_ds.data.sources.llava import LlavaSource
from hive_ds.data.sources.stores import files_below, is_image
from hive_ds.data.sources.table import TableSource
from hive_ds.data.sources.webdataset import WebDatasetSource
from hive_ds.errors import HiveError, require_one_of

FORMATS = ("llava", "table", "webdataset", "huggingface", "image_folder")


@dataclass(frozen=True)
class SourceOptions:
    """A source as the command line names it.

    Attributes:
        path: file, folder, glob pattern of tars, or name on the Hugging Face hub.
        format: one of `FORMATS`; None: told by what ``path`` is.
        images: folder, zip or tar of images, for formats that name images by path.
        split: of a Hugging Face dataset.
        columns: names of the fields.
    """

    path: str
    format: str | None = None
    images: str | None = None
    split: str | None = None
    columns: Columns = USUAL


@dataclass(frozen=True)
class Preset:
    """How a well-known data set lies on disk: of ``files`` and ``images`` the first that its folder has is taken."""

    format: str
    about: str
    files: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    columns: Columns = USUAL


PRESETS = {
    "cc3m": Preset(
        "webdataset",
        "CC3M as img2dataset or pixparse/cc3m-wds writes it: tars of key.jpg, key.txt, key.json. The caption is the "
        "alt text; --text-column names another field of key.json, --captions a file of synthetic captions",
    ),
    "llava-pretrain": Preset(
        "llava",
        "liuhaotian/LLaVA-Pretrain: 558k captions as conversations, images.zip or the folder unpacked",
        ("blip_laion_cc_sbu_558k.json",),
        ("images.zip", "images", "."),
    ),
    "llava-next": Preset(
        "huggingface",
        "lmms-lab/LLaVA-NeXT-Data: parquet with image, conversations, id; some rows are text alone",
        columns=Columns("id", "image", None, "conversations"),
    ),
    "sharegpt4v": Preset(
        "llava",
        "Lin-Chen/ShareGPT4V: captions or the instruction mix; image paths (coco/, sam/, ...) start at its folder",
        (
            "sharegpt4v_instruct_gpt4-vision_cap100k.json",
            "share-captioner_coco_lcs_sam_1246k_1107.json",
            "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
        ),
        ("data", "."),
    ),
}


def open_source(options: SourceOptions, preset: str | None = None) -> Source:
    """Open the source that ``options`` name; what ``preset`` knows fills what they leave open.

    Raises:
        HiveError: nothing there, a format that cannot be told, or a source that cannot be read.
    """
    if preset is not None:
        options = _with_preset(options, preset)
    kind = options.format or _guess(options.path, options.columns.texts)
    require_one_of("source format", kind, FORMATS)
    if options.split is not None and kind != "huggingface":
        raise HiveError(f"split {options.split!r}: a source of format {kind} has none; expected the part's own files")
    if options.columns.id is not None and kind in ("webdataset", "image_folder"):
        raise HiveError(f"id column {options.columns.id!r}: a source of format {kind} names its samples by their files")
    if options.columns.image not in (None, NONE) and kind == "webdataset":
        raise HiveError(
            f"image column {options.columns.image!r}: a source of format webdataset takes every image of a sample, or "
            f"with {NONE} its text alone"
        )
    if kind == "llava":
        return LlavaSource(options.path, options.images, options.columns)
    if kind == "table":
        return TableSource(options.path, options.images, options.columns)
    if kind == "huggingface":
        return HuggingFaceSource(options.path, split=options.split, images=options.images, columns=options.columns)
    if options.images is not None:
        raise HiveError(f"images {options.images}: a source of format {kind} holds its images itself; leave them out")
    if kind == "webdataset":
        return WebDatasetSource(options.path, options.columns)
    return ImageFolderSource(options.path, options.columns)


def _with_preset(options: SourceOptions, name: str) -> SourceOptions:
    require_one_of("preset", name, PRESETS)
    preset, folder = PRESETS[name], Path(options.path)
    columns = options.columns
    if replace(columns, texts=True) == USUAL:
        columns = replace(preset.columns, texts=columns.texts)
    options = replace(options, format=options.format or preset.format, columns=columns)
    if preset.files and folder.is_dir():
        file = _first_of(folder, preset.files)
        if file is None:
            raise HiveError(f"preset {name}: {folder} holds none of {', '.join(preset.files)}; name the JSON itself")
        options = replace(options, path=str(file))
    if preset.images and options.images is None:
        images = _first_of(Path(options.path).parent, preset.images)
        options = replace(options, images=None if images is None else str(images))
    return options


def _first_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _guess(path: str, texts: bool) -> str:
    """The format of what ``path`` is; ``texts``: whether its own are read."""
    file = Path(path)
    kinds = {".json": "llava", ".jsonl": "llava", ".csv": "table", ".tsv": "table", ".tar": "webdataset"}
    kinds[".parquet"] = "huggingface"
    if file.suffix.lower() in kinds:
        return kinds[file.suffix.lower()]
    if file.is_file():
        raise HiveError(f"source {path}: a file of unknown kind; expected {', '.join(kinds)}")
    if not file.is_dir():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return "huggingface"
        raise HiveError(
            f"source {path}: no such file or folder; expected a file, a folder, or a name on the Hugging Face hub"
        )
    tars = sorted(name for name in files_below(file) if name.lower().endswith(".tar"))
    if any("/" not in name for name in tars):  # img2dataset writes a .parquet beside each
        return "webdataset"
    if holds_dataset(file):
        return "huggingface"
    if tars and any(is_image(name) for name in files_below(file)):
        raise HiveError(f"source {path}: holds images and {tars[0]}; expected --format image_folder or webdataset")
    if tars:
        return "webdataset"
    rows = [name for name in files_below(file) if kinds.get(Path(name).suffix.lower()) in ("llava", "table")]
    beside = sorted(name for name in rows if "/" not in name)
    if texts and beside and not any(Path(name).name in METADATA for name in rows):
        raise HiveError(
            f"source {path}: holds {beside[0]}; expected that file, with --images and the folder of its pictures, or "
            "--format image_folder, which takes captions from texts beside images or the names of their folders"
        )
    return "image_folder"
