"""Where samples come from: each source names its entries at once and reads one when asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.images import decode_image
from hive_ds.data.schema import Role, Sample, Turn
from hive_ds.errors import HiveError

SPEAKERS: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Entry(Protocol):
    """One sample of a source, not read yet."""

    @property
    def id(self) -> str:
        """Name of the sample."""
        ...

    def read(self) -> Sample:
        """Read the sample and decode its images; HiveError where it cannot be used."""
        ...


class Source(Protocol):
    """Entries in a fixed order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Entry]: ...


class LlavaSource:
    """LLaVA's format: a JSON list of ``{"id", "image", "conversations": [{"from", "value"}, ...]}`` and a folder.

    ``image`` is a path below ``image_folder``, a list of them, or absent. Where no text holds ``<image>``, the images
    are put before the first question, as LLaVA does. HiveError for a missing or malformed file, a missing folder.
    """

    def __init__(self, json_path: str | Path, image_folder: str | Path) -> None:
        path, self._folder = Path(json_path), Path(image_folder)
        if not path.is_file():
            raise HiveError(f"LLaVA JSON {path}: does not exist")
        if not self._folder.is_dir():
            raise HiveError(f"image folder {self._folder}: does not exist")
        try:
            self._entries = json.loads(path.read_bytes())
        except ValueError as error:
            raise HiveError(f"LLaVA JSON {path}: is not JSON ({error})") from error
        if not isinstance(self._entries, list):
            raise HiveError(f"LLaVA JSON {path}: holds a {type(self._entries).__name__}, expected a list of samples")
        if not self._entries:
            raise HiveError(f"LLaVA JSON {path}: the list is empty, expected one sample at least")

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[LlavaEntry]:
        for index, fields in enumerate(self._entries):
            given = fields.get("id") if isinstance(fields, dict) else None
            yield LlavaEntry(f"entry-{index}" if given in (None, "") else str(given), fields, self._folder)


@dataclass(frozen=True)
class LlavaEntry:
    """One element of the JSON list."""

    id: str
    fields: Any
    folder: Path

    def read(self) -> Sample:
        """Read the sample and decode its images."""
        messages = self.fields.get("conversations") if isinstance(self.fields, dict) else None
        if not isinstance(messages, list) or not messages:
            raise HiveError("has no list of conversations")
        turns = [_turn(index, message) for index, message in enumerate(messages)]
        paths = self.fields.get("image") or []
        images = [_read_image(self.folder, path) for path in (paths if isinstance(paths, list) else [paths])]
        if images and not any(IMAGE_TOKEN in turn.content for turn in turns):
            turns[0] = Turn(turns[0].role, f"{IMAGE_TOKEN * len(images)}\n{turns[0].content}")
        return Sample(self.id, tuple(turns), tuple(images))


def _turn(index: int, message: Any) -> Turn:
    speaker = message.get("from") if isinstance(message, dict) else None
    if speaker not in SPEAKERS:
        raise HiveError(f"conversations[{index}]: speaker {speaker!r}, expected one of {', '.join(SPEAKERS)}")
    value = message.get("value")
    if not isinstance(value, str):
        raise HiveError(f"conversations[{index}]: value {value!r}, expected text")
    return Turn(SPEAKERS[speaker], value)


def _read_image(folder: Path, path: Any) -> bytes:
    if not isinstance(path, str):
        raise HiveError(f"image {path!r}: expected a path")
    try:
        file = (folder / path).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise HiveError(f"lies outside {folder}")
        data = file.read_bytes()
        decode_image(data)
    except OSError as error:
        raise HiveError(f"image {path}: {error.strerror}") from error
    except (HiveError, ValueError) as error:  # ValueError: a path with a null character
        raise HiveError(f"image {path}: {error}") from error
    return data
