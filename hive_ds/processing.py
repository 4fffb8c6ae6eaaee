"""HiveProcessor: texts with ``<image>`` and images -> the arguments of HIVE and cascaded models, as in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase

from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.chat import padding_id
from hive_ds.data.images import ImageProcessor, auto_image_processor, decode_image, to_rgb
from hive_ds.data.preprocess import Preprocessor, make_preprocessor
from hive_ds.data.schema import Turn
from hive_ds.data.text import IMAGE_POSITIONS, EncodedText, encode_text, prepare_tokenizer, render_chat
from hive_ds.errors import HiveError, require_one_of, told_as
from hive_ds.model.configuration import HiveConfig

CONFIG_NAME = "processor_config.json"

ImageInput = Image.Image | bytes | str | Path
"""A PIL image, an encoded file's bytes, or its path."""


class HiveProcessor:
    """An image processor, a tokenizer with ``<image>``, and where an image at the front of a text goes.

    Not a `ProcessorMixin`: that class stores its parts differently in transformers 4 and 5, while a folder saved
    here loads in both (``preprocessor_config.json``, the tokenizer's files, ``processor_config.json``).
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        image_position: str = "first",
        stock: Mapping[str, Any] | None = None,
    ) -> None:
        """Join them.

        Args:
            image_processor: of the vision encoder.
            tokenizer: of the LLM; gets ``<image>`` as a token.
            image_position: ``first`` or ``after_bos``, as in `DataConfig`.
            stock: what else ``processor_config.json`` tells stock transformers, of a cascaded model.

        Raises:
            HiveError: another ``image_position``.
        """
        require_one_of("image_position", image_position, IMAGE_POSITIONS)
        self.image_processor: ImageProcessor = image_processor
        self.tokenizer = prepare_tokenizer(tokenizer)
        self.image_position = image_position
        self.image_token = IMAGE_TOKEN
        self.stock = dict(stock or {})

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageInput | Sequence[Any] | None = None,
        *,
        max_length: int | None = None,
    ) -> BatchFeature:
        """Encode prompts and the images that their ``<image>`` placeholders stand for.

        Args:
            text: one prompt or a list, plain ("<image>", "<image>A photo of") or rendered by `apply_chat_template`.
            images: one image, a list in the order of the placeholders, or a list of lists, one for each prompt.
            max_length: most tokens that a prompt may have.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, S) int64, padded on the left; ``image_offsets``, a list of media
            offsets for each prompt, padding not counted; with images ``pixel_values`` (I, 3, h, w) and what else the
            image processor returns, prompt by prompt.

        Raises:
            HiveError: no prompt, placeholders and images that differ in number, an image that cannot be read, or a
                prompt that is too long.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise HiveError("no prompt: expected at least one text")
        flat = self._flatten(texts, images)
        rows = [encode_text(prompt, self.tokenizer, image_position=self.image_position) for prompt in texts]
        for row in rows:
            if max_length is not None and len(row.input_ids) > max_length:
                raise HiveError(f"prompt of {len(row.input_ids)} tokens: expected at most {max_length}")
        inputs = {**self._pad(rows), "image_offsets": [row.image_offsets for row in rows]}
        if flat:
            inputs |= self.preprocess([_load(image) for image in flat])
        return BatchFeature(inputs)

    @cached_property
    def preprocess(self) -> Preprocessor:
        """What the image processor does, as in training."""
        return make_preprocessor(self.image_processor)

    def _flatten(self, texts: Sequence[str], images: ImageInput | Sequence[Any] | None) -> list[ImageInput]:
        """Return the images in prompt order after counting them against the placeholders."""
        given = [] if images is None else [images] if isinstance(images, ImageInput) else list(images)
        expected = [prompt.count(IMAGE_TOKEN) for prompt in texts]
        if any(isinstance(group, (list, tuple)) for group in given):
            counts = [len(group) if isinstance(group, (list, tuple)) else 1 for group in given]
            if counts != expected:
                raise HiveError(f"images a prompt {counts}: expected {expected}, the {IMAGE_TOKEN} of each prompt")
            return [image for group in given for image in (group if isinstance(group, (list, tuple)) else [group])]
        if len(given) != sum(expected):
            raise HiveError(f"{len(given)} images: expected {sum(expected)}, one for each {IMAGE_TOKEN}")
        return given

    def _pad(self, rows: Sequence[EncodedText]) -> dict[str, torch.Tensor]:
        width = max(len(row.input_ids) for row in rows)
        ids = torch.full((len(rows), width), padding_id(self.tokenizer) or 0)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, width - len(row.input_ids) :] = torch.tensor(row.input_ids)
            mask[index, width - len(row.input_ids) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        images: ImageInput | Sequence[Any] | None = None,
        tokenize: bool = False,
    ) -> str | BatchFeature:
        """Render one conversation by the tokenizer's chat template.

        Args:
            conversation: messages ``{"role", "content"}``; content is text with ``<image>``, or Hugging Face's list of
                ``{"type": "image"}`` and ``{"type": "text", "text": ...}`` parts, each image on a line of its own.
            add_generation_prompt: end where the assistant's answer begins.
            images: of the conversation, for ``tokenize``.
            tokenize: encode text and images as `__call__` does, instead of returning the text.

        Raises:
            HiveError: the tokenizer has no chat template, or a part is neither image nor text.
        """
        turns = [Turn(message["role"], _content(message["content"])) for message in conversation]
        text = render_chat(turns, self.tokenizer, for_answer=add_generation_prompt)
        return self(text, images) if tokenize else text

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = True) -> str:
        """Return the text of one sequence of ids."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, sequences: Any, *, skip_special_tokens: bool = True) -> list[str]:
        """Return the text of every row of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in sequences]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write image processor, tokenizer and ``processor_config.json`` to ``folder``."""
        self.image_processor.save_pretrained(folder)  # type: ignore[attr-defined]
        self.tokenizer.save_pretrained(folder)
        config = {"processor_class": type(self).__name__, "image_position": self.image_position, **self.stock}
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_base_models(
        cls, vision_encoder: str | Path, language_model: str | Path, image_position: str = "first"
    ) -> HiveProcessor:
        """Join the encoder's image processor and the LLM's tokenizer; each a Hugging Face name or a folder.

        Raises:
            HiveError: one of them cannot be read.
        """
        image_processor = auto_image_processor(vision_encoder)
        expected = "the folder of a language model, or its name on the hub, which must be reached"
        with told_as(f"tokenizer of {language_model} does not load", expected):
            tokenizer = AutoTokenizer.from_pretrained(language_model)
        return cls(image_processor, tokenizer, image_position)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        _from_auto: bool = False,
    ) -> HiveProcessor:
        """Load what `save_pretrained` wrote; the last three arguments are `AutoProcessor`'s and change nothing.

        Raises:
            HiveError: the folder holds no processor.
        """
        config = Path(folder) / CONFIG_NAME
        if not config.is_file():
            raise HiveError(f"processor folder {folder}: holds no {CONFIG_NAME}")
        with told_as(f"processor folder {folder} does not load", "the files that a stage writes to its model folder"):
            values = json.loads(config.read_text())
            position = values.pop("image_position", "first")
            stock = values if values.get("processor_class") != cls.__name__ else None
            return cls(auto_image_processor(folder), AutoTokenizer.from_pretrained(folder), position, stock)


def _load(image: ImageInput) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, bytes):
        return decode_image(image)
    try:
        return decode_image(Path(image).read_bytes())
    except OSError as error:
        raise HiveError(f"image {image}: {error.strerror}") from error


def _content(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    lines = []
    for part in content:
        if part.get("type") not in ("image", "text"):
            raise HiveError(f"content part of type {part.get('type')!r}: expected image or text")
        lines.append(IMAGE_TOKEN if part["type"] == "image" else part["text"])
    return "\n".join(lines)


AutoProcessor.register(HiveConfig, HiveProcessor, exist_ok=True)
