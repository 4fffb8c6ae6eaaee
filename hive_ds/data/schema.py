"""The sample: what every source is turned into, what a shard holds and what the loader reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hive_ds.constants import IMAGE_TOKEN
from hive_ds.errors import HiveError

Role = Literal["user", "assistant"]
ROLES: tuple[Role, ...] = ("user", "assistant")

MDS_COLUMNS = {"id": "str", "turns": "json", "images": "bytes", "image_sizes": "json", "meta": "json"}
"""Columns of a shard. ``images`` holds the encoded files end to end, ``image_sizes`` their lengths in bytes."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation. ``content`` may hold ``<image>`` placeholders."""

    role: Role
    content: str


@dataclass(frozen=True)
class Sample:
    """A conversation with its images; a caption is one user turn ``<image>`` and one assistant turn.

    ``images`` are encoded files (JPEG, PNG, ...), in the order of the placeholders in the text.
    Raises HiveError, naming the sample, where the turns or the number of images make no sense.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        object.__setattr__(self, "images", tuple(self.images))
        _check(self)


def _check(sample: Sample) -> None:
    if not isinstance(sample.id, str) or not sample.id or not _is_unicode(sample.id):
        raise HiveError(f"sample id {sample.id!r}: expected a non-empty string that UTF-8 can hold")
    name = f"sample {sample.id!r}"
    for index, turn in enumerate(sample.turns):
        if turn.role not in ROLES:
            raise HiveError(f"{name}: turn {index} has role {turn.role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(turn.content, str):
            raise HiveError(f"{name}: turn {index} has content of type {type(turn.content).__name__}, expected str")
        if not _is_unicode(turn.content):
            raise HiveError(f"{name}: turn {index} holds half a surrogate pair, which is no text")
        if turn.role == "assistant" and IMAGE_TOKEN in turn.content:
            raise HiveError(f"{name}: turn {index} is the assistant's and holds {IMAGE_TOKEN}; only users show images")
    if not any(turn.role == "assistant" and turn.content.strip() for turn in sample.turns):
        raise HiveError(f"{name}: no assistant turn with text, so nothing to learn from")
    placeholders = sum(turn.content.count(IMAGE_TOKEN) for turn in sample.turns)
    if placeholders != len(sample.images):
        raise HiveError(f"{name}: {placeholders} {IMAGE_TOKEN} in the text, but {len(sample.images)} images")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def caption_sample(id: str, image: bytes, caption: str, meta: dict[str, Any] | None = None) -> Sample:
    """Build the sample of one captioned image: ``<image>`` from the user, the caption from the assistant."""
    return Sample(id, (Turn("user", IMAGE_TOKEN), Turn("assistant", caption)), (image,), meta or {})


def to_columns(sample: Sample) -> dict[str, Any]:
    """Return ``sample`` as the values of `MDS_COLUMNS`."""
    return {
        "id": sample.id,
        "turns": [{"role": turn.role, "content": turn.content} for turn in sample.turns],
        "images": b"".join(sample.images),
        "image_sizes": [len(image) for image in sample.images],
        "meta": sample.meta,
    }


def from_columns(columns: Mapping[str, Any]) -> Sample:
    """Rebuild a sample from the values of `MDS_COLUMNS`; HiveError where they do not fit together."""
    missing = [name for name in MDS_COLUMNS if name not in columns]
    if missing:
        raise HiveError(f"shard without column {missing[0]!r}: expected the columns {', '.join(MDS_COLUMNS)}")
    data, images, start = columns["images"], [], 0
    for size in columns["image_sizes"]:
        images.append(data[start : start + size])
        start += size
    if start != len(data):
        raise HiveError(f"sample {columns['id']!r}: image_sizes sum to {start} bytes, but there are {len(data)}")
    turns = tuple(Turn(turn["role"], turn["content"]) for turn in columns["turns"])
    return Sample(columns["id"], turns, tuple(images), columns["meta"])
