"""How a source is converted, and what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hive_ds.data.convert_images import ImageOptions
from hive_ds.errors import HiveError

REJECTS = "rejects.jsonl"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class ConvertOptions:
    """How a source is converted.

    Attributes:
        workers: processes; the output does not depend on it.
        part_size: samples of a part, the unit of work and of going on after a kill.
        images: how images are stored.
        max_reject_share: share of rejected samples past which the conversion stops.
        limit: convert the first so many samples (after shuffling) alone.
        shuffle_seed: shuffle the samples; None keeps the source's order.
        compression: of shards, as streaming names it ("zstd"); images are compressed already.
        captions: JSONL of {"id", "caption"} whose captions replace the texts.
    """

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    part_size: int = 1000
    images: ImageOptions = field(default_factory=ImageOptions)
    max_reject_share: float = 0.05
    limit: int | None = None
    shuffle_seed: int | None = None
    compression: str | None = None
    captions: Path | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "part_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HiveError(f"{name} is {value}; expected at least 1")
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise HiveError(f"shuffle_seed is {self.shuffle_seed}; expected at least 0")
        if not 0 <= self.max_reject_share <= 1:
            raise HiveError(f"max_reject_share is {self.max_reject_share}; expected 0 to 1")


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion wrote; also in ``summary.json`` of the folder, but for the time it took."""

    samples: int
    rejected: int
    images: int
    image_bytes: int
    source_image_bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Processor time of this start of the conversion by what it was spent on."""

    def __str__(self) -> str:
        rejected = f"{self.rejected} rejected" + (f", listed in {REJECTS}" if self.rejected else "")
        images = f"{self.images} images ({self.image_bytes / 1e6:.1f} MB"
        if self.image_bytes != self.source_image_bytes:
            images += f", {1 - self.image_bytes / self.source_image_bytes:.0%} less than the source's"
        took = "".join(f"; {name} took {value:.1f} s" for name, value in self.seconds.items() if value)
        blind = "; warning: no sample has an image" if self.samples and not self.images else ""
        return f"{self.samples} samples, {images}); {rejected}{took}{blind}"

    def to_json(self) -> str:
        """The text of ``summary.json``."""
        return json.dumps({name: value for name, value in vars(self).items() if name != "seconds"}, indent=2) + "\n"


def read_captions(path: str | Path) -> dict[str, str]:
    """Captions by sample id of a JSONL of {"id", "caption"}.

    HiveError names a line that is no such thing, or that has another caption for the id of an earlier one.
    """
    captions: dict[str, str] = {}
    places: dict[str, int] = {}
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            lines = list(file)  # not splitlines(), which cuts at U+2028 and others that JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise HiveError(f"captions {path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            id, caption = row["id"], row["caption"]
            if not isinstance(id, (str, int)) or not isinstance(caption, str):
                raise TypeError(f"id {id!r} and caption {caption!r} are not both text")
        except (ValueError, KeyError, TypeError) as error:
            raise HiveError(f"captions {path}, line {number}: expected {{'id', 'caption'}} ({error!r})") from error
        name = str(id)
        if captions.setdefault(name, caption) != caption:
            raise HiveError(
                f"captions {path}, line {number}: another caption of id {name!r}, which line {places[name]} has; "
                "expected one an id"
            )
        places.setdefault(name, number)
    return captions
