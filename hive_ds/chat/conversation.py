"""A conversation about pictures with a model: its history, and each answer as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from hive_ds.chat.loading import ChatModel
from hive_ds.config import SEED
from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.chat import end_token_ids, padding_id
from hive_ds.data.images import decode_image, read_image_file
from hive_ds.data.schema import Turn
from hive_ds.data.text import render_prompt
from hive_ds.errors import HiveError
from hive_ds.evaluation.generation import GREEDY
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.language import longest_text
from hive_ds.model.vision import patch_grids


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are made."""

    max_new_tokens: int = 128
    """Longest answer; less where the model's longest text leaves less."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above it, tokens are drawn."""
    beams: int = 1
    """Beams search for a likelier answer; it then comes in one piece."""
    seed: int | None = None
    """Of what is drawn: the same question after the same history gets the same answer. None draws anew each time."""

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("temperature", 0), ("beams", 1)):
            if not getattr(self, name) >= low:  # NaN is not
                raise HiveError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least {low}")
        if self.seed is not None and not SEED.accepts(self.seed):
            raise HiveError(f"seed is {self.seed}, expected {SEED.expected}")

    def for_generate(self) -> dict[str, Any]:
        """Arguments of ``generate``; a base model's own defaults neither draw where 0 was asked for, nor penalise."""
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature else {}
        return {**GREEDY, **drawn, "num_beams": self.beams}


@dataclass(frozen=True)
class Answer:
    """An answer, with what a map of its attention needs.

    Attributes:
        text: what the model said.
        token_ids: (1, T) of the prompt and the answer.
        prompt_length: tokens of the prompt.
        inputs: of the model beside the tokens: media offsets and pixels.
        images: all that were shown, in order.
    """

    text: str
    token_ids: Tensor
    prompt_length: int
    inputs: dict[str, Any]
    images: tuple[Image.Image, ...]


@dataclass
class Conversation:
    """Turns so far; a picture shown comes before the next question.

    With template ``plain`` there is no history: each answer is a caption of the pictures shown last.
    """

    chat: ChatModel
    settings: AnswerSettings = field(default_factory=AnswerSettings)
    turns: list[Turn] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    shown: list[Image.Image] = field(default_factory=list)
    """Pictures that no question stands behind yet."""

    def show(self, image: Image.Image) -> None:
        """Put a picture before the next question."""
        self.shown.append(image)

    def reset(self) -> None:
        """Forget everything."""
        self.turns, self.images, self.shown = [], [], []

    def ask(self, question: str, streamer: BaseStreamer | None = None) -> Answer:
        """Answer ``question``; history changes only if that succeeds.

        ``question`` may say with ``<image>`` where the pictures shown stand; by default they come first. ``streamer``
        gets the answer's tokens as they come, if the settings have one beam.

        Raises:
            HiveError: placeholders and pictures differ in number, the text is too long, or it has no picture for a
                caption.
        """
        if self.chat.template == "plain":
            return self._caption(streamer)
        turn = Turn("user", _with_places(question, len(self.shown)))
        turns, images = [*self.turns, turn], [*self.images, *self.shown]
        answer = self._generate(turns, images, streamer)
        self.turns, self.images, self.shown = [*turns, Turn("assistant", answer.text)], images, []
        return answer

    def _caption(self, streamer: BaseStreamer | None) -> Answer:
        images = self.shown or self.images
        if not images:
            raise HiveError("no picture: this model gives captions (template plain) and was shown none")
        answer = self._generate([Turn("user", IMAGE_TOKEN * len(images))], images, streamer)
        self.images, self.shown = images, []
        return answer

    @torch.no_grad()
    def _generate(self, turns: Sequence[Turn], images: Sequence[Image.Image], streamer: BaseStreamer | None) -> Answer:
        model, processor = self.chat.model, self.chat.processor
        tokenizer = processor.tokenizer
        prompt = render_prompt(turns, tokenizer, template=self.chat.template)
        inputs = processor(prompt, images or None).to(model.device, model.dtype)
        length, longest = inputs["input_ids"].shape[1], self._longest_text(inputs)
        if length >= longest:
            raise HiveError(f"prompt of {length} tokens: expected at most {longest - 1}")
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed)
        token_ids = model.generate(
            **inputs,
            **self.settings.for_generate(),
            max_new_tokens=min(self.settings.max_new_tokens, longest - length),
            eos_token_id=end_token_ids(tokenizer, self.chat.template),
            pad_token_id=padding_id(tokenizer),
            streamer=streamer if self.settings.beams == 1 else None,
        )
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        return Answer(processor.decode(token_ids[0, length:]).strip(), token_ids, length, rest, tuple(images))

    def _longest_text(self, inputs: Mapping[str, Any]) -> int:
        """Text tokens, the answer's included, that the LLM takes; a cascaded model's images are tokens, too."""
        config, taken = self.chat.model.config, 0
        if "pixel_values" in inputs and not isinstance(self.chat.model, HiveForCausalLM):
            grids = patch_grids(config.vision_config, inputs["pixel_values"], inputs.get("spatial_shapes"))
            taken = sum(rows * columns for rows, columns in grids)
        return longest_text(config.text_config) - taken


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file.

    Raises:
        HiveError: no such file, or not a picture.
    """
    return decode_image(read_image_file(path))


def _with_places(question: str, pictures: int) -> str:
    """``question`` with a placeholder for every picture; where it has none, before it on a line, as converted data."""
    places = question.count(IMAGE_TOKEN)
    if places and places != pictures:
        raise HiveError(f"question with {places} {IMAGE_TOKEN}: expected {pictures}, one for each picture shown")
    return question if places or not pictures else f"{IMAGE_TOKEN * pictures}\n{question}"
