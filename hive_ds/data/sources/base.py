"""What every source is: samples by number, read when asked, in any process; and how fields become a sample."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.schema import Role, Sample, Turn
from hive_ds.errors import HiveError

SPEAKERS: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
NONE = "none"
"""In place of a column's name: there is none."""
Fields = Mapping[str, Any]
ReadImage = Callable[[Any], bytes]


class Source(Protocol):
    """Samples in a fixed order, each read on its own.

    A source is opened once and then read by forked processes: it holds no open file that they would share.
    """

    @property
    def origin(self) -> Mapping[str, str | None]:
        """What decides the samples, by name (`describe_origin`)."""
        ...

    def __len__(self) -> int: ...

    def sample_id(self, index: int) -> str:
        """Name of sample ``index``, also where it cannot be read."""
        ...

    def read(self, index: int) -> Sample:
        """Sample ``index``, its images as encoded files that nobody has decoded yet; HiveError where it is unusable."""
        ...

    def images(self, index: int) -> tuple[bytes, ...]:
        """The images of sample ``index``, whatever its text is."""
        ...


@dataclass(frozen=True)
class Columns:
    """Names of the fields of a source. None: the usual names are looked for, in this order.

    ``image`` is `NONE` for text alone. Without ``texts`` a source needs no text, and only its images can be read.
    """

    id: str | None = None
    image: str | None = None
    text: str | None = None
    conversations: str | None = None
    texts: bool = True

    USUAL_ID = ("id", "uid", "key", "__key__")
    USUAL_IMAGE = (
        *("image", "images", "image_path", "path", "file_name", "filename", "jpg", "jpeg", "png", "webp"),
        *("filepath", "file_path", "image_file", "image_filename", "image_name", "img", "img_path"),
    )
    USUAL_TEXT = ("caption", "text", "txt", "captions", "title", "label")
    USUAL_CONVERSATIONS = ("conversations", "messages")

    def __post_init__(self) -> None:
        if self.text and self.conversations:
            raise HiveError(
                f"text column {self.text!r} and conversations column {self.conversations!r}: expected one of them"
            )

    def resolve(self, names: Sequence[str], where: str) -> Columns:
        """These columns with the usual names filled in from ``names``, in capitals or not.

        HiveError names a column asked for that is not there, and a source without text or images.
        """

        def pick(given: str | None, usual: Sequence[str]) -> str | None:
            if given is not None and given not in names:
                raise HiveError(f"{where}: has no column {given!r}; it has {', '.join(names)}")
            found = {name.lower(): name for name in reversed(names)}
            return given or next((found[name] for name in usual if name in found), None)

        image = None if self.image == NONE else pick(self.image, self.USUAL_IMAGE)
        if image is None and self.image != NONE:
            raise HiveError(
                f"{where}: has no column of images; name one of {', '.join(names)} with --image-column, or {NONE} for "
                "text alone"
            )
        if not self.texts:
            return Columns(pick(self.id, self.USUAL_ID), image, texts=False)
        conversations = None if self.text else pick(self.conversations, self.USUAL_CONVERSATIONS)
        text = None if conversations else pick(self.text, self.USUAL_TEXT)
        if not (conversations or text):
            raise HiveError(f"{where}: has no column of text; name one of {', '.join(names)} with --text-column")
        return Columns(pick(self.id, self.USUAL_ID), image, text, conversations)


USUAL = Columns()


def describe_origin(
    format: str,
    source: str,
    columns: Columns,
    *,
    files: Iterable[str | Path] = (),
    images: str | Path | None = None,
    split: str | None = None,
) -> dict[str, str | None]:
    """What decides the samples of a source: its options, and size and time of ``files`` that it reads."""
    archive = [] if images is None or Path(images).is_dir() else [images]
    return {
        "source": os.path.abspath(source) if Path(source).exists() else source,
        "source format": format,
        "source images": None if images is None else os.path.abspath(images),
        "split": split,
        "id column": columns.id,
        "image column": columns.image,
        "text column": columns.text,
        "conversations column": columns.conversations,
        "source files": _stamp([*files, *archive]),
    }


def _stamp(files: Sequence[str | Path]) -> str:
    """Number, bytes, last change and a digest of ``files``: another one after any of them was written anew."""
    digest, size, changed = hashlib.sha256(), 0, 0
    for file in files:
        stat = Path(file).stat()
        digest.update(f"{os.path.abspath(file)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        size, changed = size + stat.st_size, max(changed, stat.st_mtime_ns)
    when = datetime.fromtimestamp(changed / 1e9, timezone.utc).isoformat(" ", "milliseconds")
    return f"{len(files)} of {size} bytes, changed {when} ({digest.hexdigest()[:8]})"


def build_sample(id: str, fields: Fields, columns: Columns, read_image: ReadImage) -> Sample:
    """The sample of one row: its conversation, or its caption; ``read_image`` turns an image's value into a file.

    Where no text holds ``<image>``, the images come before the first question, as in LLaVA. HiveError for a video,
    and for a caption of no image unless ``columns`` ask for text alone.
    """
    if columns.conversations:
        turns = conversation(fields.get(columns.conversations), fields.get("system"))
    else:
        turns = [Turn("user", ""), Turn("assistant", _caption(fields.get(columns.text or ""), columns.text))]
    images = read_images(fields, columns, read_image)
    if columns.text and columns.image and not images:
        raise HiveError(f"has a caption and no image; --image-column {NONE} if text alone is meant")
    if fields.get("video") and not images:
        raise HiveError(f"shows the video {str(fields['video'])[:80]}; expected images")
    if images and not any(IMAGE_TOKEN in turn.content for turn in turns):
        asked = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if asked is None:
            raise HiveError("has images and no user's turn that could show them")
        question, marks = turns[asked].content, IMAGE_TOKEN * len(images)
        turns[asked] = Turn("user", f"{marks}\n{question}" if question else marks)
    return Sample(id, tuple(turns), images)


def read_images(fields: Fields, columns: Columns, read_image: ReadImage) -> tuple[bytes, ...]:
    """The images of one row, none where its field is empty."""
    given = _listed(fields.get(columns.image)) if columns.image else None
    values = list(given) if isinstance(given, (list, tuple)) else [] if given in (None, "") else [given]
    return tuple(read_image(value) for value in values)


def _listed(value: Any) -> Any:
    """``value``, or a list of structs where it is a struct of lists, as `datasets` reads a Sequence of structs."""
    if isinstance(value, Mapping) and value and all(isinstance(values, list) for values in value.values()):
        return [dict(zip(value, values, strict=True)) for values in zip(*value.values(), strict=True)]
    return value


def _caption(value: Any, column: str | None) -> str:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise HiveError(f"caption is not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise HiveError(f"caption {value!r} in column {column!r}: expected text")
    return value.replace(IMAGE_TOKEN, " ").strip()


def conversation(messages: Any, system_prompt: Any = None) -> list[Turn]:
    """Turns of LLaVA's ``[{"from", "value"}, ...]`` or the chat format ``[{"role", "content"}, ...]``.

    What a system message, or ``system_prompt`` beside them, says is put before the next user's words; HiveError where
    no user speaks after it.
    """
    if isinstance(messages, (str, bytes)):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise HiveError(f"conversations are not JSON ({error})") from error
    messages = _listed(messages)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise HiveError(f"has no list of conversations, but {str(messages)[:80]!r}")
    turns: list[Turn] = []
    system = f"{system_prompt}\n" if isinstance(system_prompt, str) and system_prompt else ""
    for index, message in enumerate(messages):
        speaker, text = _message(index, message)
        if speaker == "system":
            system += f"{text}\n"
        elif SPEAKERS[speaker] == "user":
            turns.append(Turn("user", system + text))
            system = ""
        else:
            turns.append(Turn("assistant", text))
    if system.strip():
        raise HiveError(f"system message {system.strip()[:80]!r} has no user's turn after it")
    return turns


def _message(index: int, message: Any) -> tuple[str, str]:
    fields = message if isinstance(message, Mapping) else {}
    speaker = fields.get("from", fields.get("role"))
    if not isinstance(speaker, str) or speaker not in (*SPEAKERS, "system"):
        raise HiveError(f"conversations[{index}]: speaker {speaker!r}, expected one of {', '.join(SPEAKERS)}, system")
    text = fields.get("value", fields.get("content"))
    if isinstance(text, (list, tuple)):
        text = "".join(_part(index, part) for part in text)
    if not isinstance(text, str):
        raise HiveError(f"conversations[{index}]: value {text!r}, expected text")
    return speaker, text


def _part(index: int, part: Any) -> str:
    """Text of one element of a message's content list; an image's is the placeholder."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image", "image_url"):
        return f"{IMAGE_TOKEN}\n"
    if kind != "text" or not isinstance(part.get("text"), str):
        raise HiveError(f"conversations[{index}]: part {part!r}, expected {{'type': 'text', 'text': ...}} or an image")
    return str(part["text"])
