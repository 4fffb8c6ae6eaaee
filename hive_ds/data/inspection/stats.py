"""What a folder of shards holds: lengths of text, turns, images and their sizes."""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from hive_ds.data.inspection.histogram import Histogram
from hive_ds.data.inspection.text import TextSettings, report_text
from hive_ds.data.mds.reading import open_folder
from hive_ds.data.schema import Sample
from hive_ds.errors import HiveError
from hive_ds.files import write_whole
from hive_ds.page import document

_EXIF_ORIENTATION = 0x0112
_TAKES_A_QUARTER_TURN = (5, 6, 7, 8)


def _numbers() -> array[int]:
    return array("q")


@dataclass
class Measures:
    """Numbers of every sample and image that can be read: 8 bytes each, whatever the samples hold."""

    characters: array[int] = field(default_factory=_numbers)
    tokens: array[int] = field(default_factory=_numbers)
    turns: array[int] = field(default_factory=_numbers)
    images: array[int] = field(default_factory=_numbers)
    widths: array[int] = field(default_factory=_numbers)
    heights: array[int] = field(default_factory=_numbers)
    image_bytes: array[int] = field(default_factory=_numbers)
    unreadable: int = 0
    """Samples and images that cannot be read."""
    refused: int = 0
    """Samples that do not fit the template."""

    def add(self, sample: Sample) -> None:
        """Measure ``sample``; of its images only the headers are read."""
        self.characters.append(sum(len(turn.content) for turn in sample.turns))
        self.turns.append(len(sample.turns))
        self.images.append(len(sample.images))
        for image in sample.images:
            try:
                width, height = image_size(image)
            except HiveError:
                self.unreadable += 1
                continue
            self.widths.append(width)
            self.heights.append(height)
            self.image_bytes.append(len(image))

    def histograms(self) -> list[Histogram]:
        """One of each measure that has a value."""
        widths, heights = _array(self.widths), _array(self.heights)
        measures: dict[str, npt.NDArray[Any]] = {
            "characters a sample": _array(self.characters),
            "tokens a sample": _array(self.tokens),
            "turns a sample": _array(self.turns),
            "images a sample": _array(self.images),
            "image width": widths,
            "image height": heights,
            "megapixels": widths * heights / 1e6,
            "width / height": widths / np.maximum(heights, 1),
            "bytes an image": _array(self.image_bytes),
        }
        return [Histogram.of(name, values) for name, values in measures.items() if len(values)]


def _array(values: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of an encoded image held upright, from its header; HiveError where it has none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            # Pillow gives the size of a TIFF as it is upright, and of no other kind.
            turned = image.format != "TIFF" and image.getexif().get(_EXIF_ORIENTATION) in _TAKES_A_QUARTER_TURN
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more on bad files
        raise HiveError(f"image of {len(data)} bytes cannot be read: {error}") from error
    return (height, width) if turned else (width, height)


@dataclass(frozen=True)
class Stats:
    """The histograms of a folder; ``str()`` shows them as text."""

    folder: Path
    samples: int
    notes: list[str]
    histograms: list[Histogram]

    def __str__(self) -> str:
        heading = f"{self.folder}: {self.samples} samples"
        return "\n".join([heading, *self.notes, "", *(histogram.as_text() for histogram in self.histograms)])

    def write(self, page: Path) -> Path:
        """Write the HTML page ``page`` and, beside it, the same numbers as JSON; returns the latter's path."""
        title = f"What {self.folder} holds"
        sections = [f"<h1>{escape(title)}</h1>", f"<p>{self.samples} samples.</p>"]
        sections += [f"<p>{escape(note)}</p>" for note in self.notes]
        sections += [histogram.as_html() for histogram in self.histograms]
        write_whole(page, document(title, sections))
        numbers = {
            "folder": str(self.folder),
            "samples": self.samples,
            "notes": self.notes,
            "histograms": {histogram.name: histogram.as_json() for histogram in self.histograms},
        }
        beside = page.with_suffix(".json")
        write_whole(beside, json.dumps(numbers, indent=1) + "\n")
        return beside


def measure_folder(folder: str | Path, settings: TextSettings | None = None) -> Stats:
    """Measure every sample of a local folder of shards; HiveError where there is none, or nothing can be read.

    Tokens are counted where ``settings`` names a tokenizer: of the whole text, before any cut.
    """
    shards, measures = open_folder(folder), Measures()
    tokenizer = settings.load() if settings else None
    for index in tqdm(range(len(shards)), desc="stats", unit="sample", disable=None):
        try:
            sample = shards.get(index)
        except HiveError:
            measures.unreadable += 1
            continue
        measures.add(sample)
        if settings and tokenizer:
            text = report_text(sample, tokenizer, settings).whole
            measures.refused += text is None
            measures.tokens.extend([len(text.input_ids)] if text else [])
    if not measures.characters:
        raise HiveError(f"data folder {folder}: no sample can be read; see: hive-ds data verify {folder}")
    notes = []
    if settings:
        notes.append(f"Tokens of {settings.tokenizer}, template {settings.template}, before any cut.")
    if measures.unreadable:
        notes.append(f"{measures.unreadable} samples or images cannot be read; see: hive-ds data verify {folder}")
    if measures.refused:
        notes.append(f"{measures.refused} samples do not fit the template, so their tokens are not counted.")
    return Stats(Path(folder), len(shards), notes, measures.histograms())
