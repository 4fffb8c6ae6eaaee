"""New captions for pictures, by any Hugging Face captioner: a JSONL that conversion reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from hive_ds.data.images import decode_image
from hive_ds.errors import HiveError, require_one_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class CaptionerSettings:
    """Which captioner, and how it is run.

    ``prompt`` is what the model is asked or what its captions start with; some need none (BLIP), some a task's name
    (Florence-2: ``<MORE_DETAILED_CAPTION>``). ``device`` and ``dtype`` by default: a GPU in bf16, else the CPU in fp32.
    """

    model: str
    prompt: str | None = None
    max_new_tokens: int = 64
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise HiveError(f"max-new-tokens is {self.max_new_tokens}, expected at least 1")
        if self.dtype is not None:
            require_one_of("dtype", self.dtype, DTYPES)


class Captioner:
    """A captioner in memory. HiveError where it cannot be loaded; no code that comes with a model is run."""

    def __init__(self, settings: CaptionerSettings) -> None:
        self.settings = settings
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = DTYPES[settings.dtype or ("fp32" if device == "cpu" else "bf16")]
        try:
            self._device = torch.device(device)
            self._processor = AutoProcessor.from_pretrained(settings.model)
            model = AutoModelForImageTextToText.from_pretrained(settings.model, dtype=self._dtype)
            self._model = model.to(self._device).eval()
        except Exception as error:  # the hub, configs, weights and devices each raise their own
            reason = str(error).strip().split("\n", 1)[0]
            raise HiveError(f"captioner {settings.model}: cannot be loaded on {device} ({reason})") from error
        self._text = self._render_prompt()
        if not self._model.config.is_encoder_decoder:
            self._processor.tokenizer.padding_side = "left"  # what is generated must follow the prompt at once

    def _render_prompt(self) -> str | None:
        prompt = self.settings.prompt
        if not getattr(self._processor, "chat_template", None):
            return prompt
        if prompt is None:
            raise HiveError(f"captioner {self.settings.model}: is a chat model, expected --prompt, what to ask it")
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Caption RGB ``images``, greedily; a prompt that the model repeats is left out."""
        inputs = self._prepare(images).to(self._device, self._dtype)
        output = self._model.generate(**inputs, max_new_tokens=self.settings.max_new_tokens, do_sample=False)
        given = inputs.get("input_ids")
        if given is not None and torch.equal(output[:, : given.shape[1]], given):
            output = output[:, given.shape[1] :]
        captions = self._processor.batch_decode(output, skip_special_tokens=True)
        return [self._without_prompt(caption.strip()) for caption in captions]

    def _prepare(self, images: Sequence[Image.Image]) -> Any:
        try:
            if self._text is None:
                return self._processor(images=list(images), return_tensors="pt")
            text = [self._text] * len(images)
            # Chat models take a list of pictures for each text, and would count a flat one as the first text's.
            pictures = [[image] for image in images] if self._text != self.settings.prompt else list(images)
            return self._processor(images=pictures, text=text, return_tensors="pt", padding=True)
        except Exception as error:  # processors check their inputs in many ways; with their own prompt, too
            reason, prompt = " ".join(str(error).split()), self.settings.prompt
            expected = "expected another --prompt" if prompt else "expected a --prompt"
            raise HiveError(
                f"captioner {self.settings.model}: refuses pictures with prompt {prompt!r}, {expected} ({reason})"
            ) from error

    def _without_prompt(self, caption: str) -> str:
        """Some models (BLIP) write on from the prompt, in small letters."""
        prompt = self.settings.prompt or ""
        return caption[len(prompt) :].strip() if caption.lower().startswith(prompt.lower()) else caption


@dataclass
class RecaptionSummary:
    """What became of the samples."""

    out: Path
    written: int = 0
    done_before: int = 0
    repeated: int = 0
    other_pictures: int = 0
    """Of those repeated: whose pictures are not the earlier sample's."""
    without_image: int = 0
    unreadable: int = 0
    first_unreadable: str = ""
    """Number of the sample, and why it cannot be read."""

    def __str__(self) -> str:
        counts = f"{self.written} captions written, {self.done_before} were there, {self.without_image} without image"
        unreadable = f", {self.unreadable} unreadable (the first, {self.first_unreadable})" if self.unreadable else ""
        repeated = f", {self.repeated} with the id of an earlier sample and its caption" if self.repeated else ""
        if self.other_pictures:
            repeated += f", {self.other_pictures} of them with other pictures: expected ids (--id-column) that differ"
        return (
            f"{self.out}: {counts}{unreadable}{repeated}; use them with: hive-ds data convert ... --captions {self.out}"
        )


class PictureSource(Protocol):
    """Pictures by sample: a source of conversion, or a folder of shards."""

    def __len__(self) -> int: ...

    def sample_id(self, index: int) -> str:
        """Name of sample ``index``."""
        ...

    def images(self, index: int) -> tuple[bytes, ...]:
        """Encoded image files of sample ``index``."""
        ...


@dataclass(frozen=True)
class _Pictures:
    """A sample's id and its pictures."""

    id: str
    images: list[Image.Image]


def recaption(
    source: PictureSource, out: str | Path, settings: CaptionerSettings, *, batch_size: int = 16
) -> RecaptionSummary:
    """Caption every sample with images of ``source``; ``out`` gets one line of JSON for each.

    A line holds ``id``, ``caption``, ``captioner`` and ``prompt``; a sample of several images has their captions, one
    after another. Samples that ``out`` has already are not done again. HiveError where ``out`` comes from another
    captioner or prompt.
    """
    if batch_size < 1:
        raise HiveError(f"batch-size is {batch_size}, expected at least 1")
    path = Path(out)
    done = _resume(path, settings)
    captioner, summary = Captioner(settings), RecaptionSummary(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(source), desc="recaption", unit="sample", disable=None) as bar,
    ):
        batch: list[_Pictures] = []
        for pictures in _undone(source, done, summary, bar):
            batch.append(pictures)
            if sum(len(sample.images) for sample in batch) >= batch_size:
                _write(batch, captioner, file, summary, batch_size)
                batch = []
        _write(batch, captioner, file, summary, batch_size)
    return summary


def _undone(source: PictureSource, done: set[str], summary: RecaptionSummary, bar: Any) -> Iterator[_Pictures]:
    seen: dict[str, bytes] = {}
    for index in range(len(source)):
        bar.update()
        try:
            id, images = source.sample_id(index), source.images(index)
            if not images:
                summary.without_image += 1
                continue
            digest = hashlib.blake2b(b"".join(images), digest_size=8).digest()
            if id in seen:
                summary.repeated += 1
                summary.other_pictures += seen[id] != digest
            elif id in done:
                seen[id] = digest
                summary.done_before += 1
            else:
                pictures = _Pictures(id, [decode_image(image) for image in images])
                seen[id] = digest
                yield pictures
        except HiveError as error:
            summary.unreadable += 1
            summary.first_unreadable = summary.first_unreadable or f"number {index}: {error}"


def _write(
    batch: list[_Pictures], captioner: Captioner, file: TextIO, summary: RecaptionSummary, batch_size: int
) -> None:
    images = [image for sample in batch for image in sample.images]
    captions: list[str] = []
    for start in range(0, len(images), batch_size):
        captions += captioner(images[start : start + batch_size])
    for sample in batch:
        own, captions = captions[: len(sample.images)], captions[len(sample.images) :]
        file.write(json.dumps({"id": sample.id, "caption": " ".join(own), **_origin(captioner.settings)}) + "\n")
    file.flush()
    summary.written += len(batch)


def _origin(settings: CaptionerSettings) -> dict[str, str | None]:
    return {"captioner": settings.model, "prompt": settings.prompt}


def _resume(path: Path, settings: CaptionerSettings) -> set[str]:
    """Return the ids that ``path`` has; a last line without its end, which a kill left, is cut off."""
    ids: set[str] = set()
    if not path.exists():
        return ids
    with path.open("rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(file.seek(-len(line), 2))
                break
            ids.add(_id_of(line, f"{path} line {number}", settings))
    return ids


def _id_of(line: bytes, place: str, settings: CaptionerSettings) -> str:
    try:
        fields = json.loads(line)
        id, origin = fields["id"], {name: fields[name] for name in _origin(settings)}
    except (ValueError, KeyError, TypeError) as error:
        raise HiveError(f"{place}: expected JSON with id, caption, captioner and prompt; name a new file") from error
    if origin != _origin(settings):
        raise HiveError(f"{place}: comes from {origin}, expected {_origin(settings)}; name a new file")
    return str(id)
