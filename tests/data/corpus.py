"""A corpus in LLaVA's format: odd files that are fine, and bad ones of many kinds, each with the reason expected."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hive_ds.data.sources.llava import LlavaSource


def talk(*values: str) -> list[dict[str, str]]:
    """Turns of human and gpt, by turns."""
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def photo(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth noise."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """``image`` as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _announced(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 20]) + data[middle + 20 :]


def good_files() -> dict[str, bytes]:
    """Files that must be kept byte for byte."""
    sixteen = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    return {
        "plain.jpg": encoded(photo(), "jpeg"),
        "turned.jpg": encoded(photo(), "jpeg", exif=_exif(6)),
        "progressive.jpg": encoded(photo(), "jpeg", progressive=True),
        "cmyk.jpg": encoded(photo(mode="CMYK"), "jpeg"),
        "grey.jpg": encoded(photo(mode="L"), "jpeg"),
        "palette.png": encoded(photo(mode="P"), "png", transparency=3),
        "alpha.png": encoded(photo(mode="RGBA"), "png"),
        "grey-alpha.png": encoded(photo(mode="LA"), "png"),
        "one-bit.png": encoded(photo(mode="1"), "png"),
        "sixteen-bit.png": encoded(sixteen, "png"),
        "animated.gif": encoded(photo(), "gif", save_all=True, append_images=[photo(seed=1)]),
        "lossy.webp": encoded(photo(), "webp"),
        "plain.bmp": encoded(photo(), "bmp"),
        "plain.tif": encoded(photo(), "tiff"),
        "wrong-suffix.jpg": encoded(photo(), "png"),
        "sub/deep/plain.png": encoded(photo(), "png"),
    }


JPEG, PNG = encoded(photo(), "jpeg"), encoded(photo(), "png")

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "cannot be read"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "cannot be read"),
    "cut.png": (PNG[: len(PNG) // 2], "cannot be read"),
    "cut.webp": (encoded(photo(), "webp")[:60], "cannot be read"),
    "cut.bmp": (encoded(photo(), "bmp")[:500], "truncated"),
    "cut.tif": (encoded(photo(), "tiff")[:300], "cannot be read"),
    "cut.gif": (encoded(photo(), "gif")[:60], "cannot be read"),
    "flipped.png": (_flipped(PNG), "cannot be read"),
    "header.gif": (b"GIF89a nothing", "cannot be read"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "no known image format"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known image format"),
    "paper.pdf": (b"%PDF-1.7\n%EOF", "no known image format"),
    "zeros.jpg": (bytes(4000), "no known image format"),
    "packed.jpg": (gzip.compress(JPEG, mtime=0), "no known image format"),
    "text.png": (b"see https://example.com/a.png", "no known image format"),
    "bomb.png": (_announced(60_000, 60_000), "decompression bomb"),
    "strip.png": (_announced(8_000, 40), "8000 x 40 pixels: one side is 200 times the other"),
    "long.png": (_announced(60_000, 1_000), "60000 x 1000 pixels: expected at most 16384 a side"),
    "dot.png": (encoded(photo(1, 1), "png"), "1 x 1 pixels"),
    "line.png": (encoded(photo(300, 2), "png"), "300 x 2 pixels"),
    "floats.tif": (encoded(Image.fromarray(np.ones((20, 20), np.float32)), "tiff"), "32-bit floats"),
}

_SHOWN = talk("<image>", "x")
_BRIEF = {"from": "system", "value": "Be brief."}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "missing": ({"image": "none.png", "conversations": _SHOWN}, "none.png: No such file"),
    "outside": ({"image": "../data.json", "conversations": _SHOWN}, "lies outside"),
    "folder": ({"image": "sub", "conversations": _SHOWN}, "Is a directory"),
    "null": ({"image": "a\0b", "conversations": _SHOWN}, "null"),
    "long": ({"image": "x" * 999, "conversations": _SHOWN}, "image x{200}"),
    "number": ({"image": 5, "conversations": _SHOWN}, "image 5: expected a path"),
    "second": (
        {"image": ["plain.jpg", "cut.jpg"], "conversations": talk("<image><image>", "x")},
        "image 1: .*cannot be read",
    ),
    "too many": ({"image": "plain.jpg", "conversations": talk("<image><image>", "x")}, "2 <image> in the text, but 1"),
    "no image": ({"conversations": _SHOWN}, "1 <image> in the text, but 0 images"),
    "speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "speaker 'narrator'"),
    "speakers": ({"conversations": [{"from": ["human"], "value": "x"}]}, r"speaker \['human'\], expected one of human"),
    "value": ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "value None, expected text"),
    "silent": ({"conversations": talk("Hello?")}, "nothing to learn"),
    "blank": ({"conversations": talk("Hello?", "  \n")}, "nothing to learn"),
    "nothing": ({"conversations": []}, "no list of conversations"),
    "late system": (
        {"conversations": [*talk("Hello?"), _BRIEF, {"from": "gpt", "value": "Yes."}]},
        "system message 'Be brief.' has no user's turn after it",
    ),
    "last system": (
        {"conversations": [*talk("Hello?", "Yes."), _BRIEF]},
        "system message 'Be brief.' has no user's turn after it",
    ),
    "string": ({"conversations": "[{"}, "not JSON"),
    "half": ({"conversations": talk("\ud83d", "x")}, "surrogate"),
    "shows": ({"image": "plain.jpg", "conversations": talk("Draw it.", "<image>")}, "only users show images"),
}


def write_corpus(folder: Path) -> tuple[Path, Path, dict[str, str]]:
    """Write data.json and images/; return both and the reason expected of every bad sample, good ones between them."""
    images = folder / "images"
    for name, data in {**good_files(), **{name: data for name, (data, _) in BAD_FILES.items()}}.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(data)
    rows: list[Any] = [{"id": f"bad/{name}", **fields} for name, (fields, _) in BAD_ROWS.items()]
    rows += [{"id": f"bad/{name}", "image": name, "conversations": _SHOWN} for name in BAD_FILES]
    for at, name in enumerate(good_files()):
        rows.insert(3 * at, {"id": f"good/{name}", "image": name, "conversations": talk("<image>\nWhat?", f"{name}.")})
    rows += ["not a sample", {"id": "good/text", "conversations": talk("How many legs has a dog?", "Four.")}]
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    reasons = {f"bad/{name}": reason for name, (_, reason) in [*BAD_FILES.items(), *BAD_ROWS.items()]}
    return path, images, {**reasons, f"entry-{len(rows) - 2}": "expected an object with fields"}


def make_source(folder: Path, count: int = 60) -> LlavaSource:
    """A source of small pictures, a bad one among them."""
    (folder / "images").mkdir()
    for number in range(count):
        data = b"no picture" if number == 7 else encoded(photo(seed=number), "jpeg")
        (folder / "images" / f"{number}.jpg").write_bytes(data)
    rows = [{"id": str(n), "image": f"{n}.jpg", "conversations": talk("<image>", f"Number {n}.")} for n in range(count)]
    (folder / "data.json").write_text(json.dumps(rows))
    return LlavaSource(folder / "data.json", folder / "images")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write_pictures(root: Path) -> list[str]:
    root.mkdir()
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(encoded(photo(seed=number), "jpeg"))
    return [f"{number}.jpg" for number in range(3)]


def _table_of_pictures(root: Path) -> tuple[Path, list[str]]:
    names = _write_pictures(root)
    (root / "data.csv").write_text("\n".join(["image,width", *(f"{name},24" for name in names)]))
    return root / "data.csv", names


def _llava_of_pictures(root: Path) -> tuple[Path, list[str]]:
    names = _write_pictures(root)
    (root / "data.json").write_text(json.dumps([{"id": name[0], "image": name} for name in names]))
    return root / "data.json", [name[0] for name in names]


def _tar_of_pictures(root: Path) -> tuple[Path, list[str]]:
    names = _write_pictures(root)
    with tarfile.open(root / "00.tar", "w") as tar:
        for name in names:
            tar.add(root / name, name)
    return root, [f"00/{name[0]}" for name in names]


def _parquet_of_pictures(root: Path) -> tuple[Path, list[str]]:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")
    images = [{"bytes": (root / name).read_bytes(), "path": None} for name in _write_pictures(root)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(root / "data.parquet")
    return root, ["row-0", "row-1", "row-2"]


PICTURES_ALONE: dict[str, Callable[[Path], tuple[Path, list[str]]]] = {
    "folder": lambda root: (root, _write_pictures(root)),
    "table": _table_of_pictures,
    "llava": _llava_of_pictures,
    "webdataset": _tar_of_pictures,
    "parquet": _parquet_of_pictures,
}
"""Sources of three pictures without a text: writes one below a new folder, returns its path and its ids."""
