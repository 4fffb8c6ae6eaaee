"""Features before and after an export, on random pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from hive_ds.errors import HiveError
from hive_ds.model.vision import encode_images

TOLERANCE = 1e-5
"""Largest difference between features before and after."""
PICTURES = 2


def processed_pictures(processor: BaseImageProcessor) -> dict[str, Tensor]:
    """Random pictures, 96 x 96, through the image processor."""
    pixels = torch.randint(0, 256, (PICTURES, 96, 96, 3), generator=_generator(), dtype=torch.uint8)
    return dict(processor(list(pixels.numpy()), return_tensors="pt").items())


def square_pictures(size: int) -> Tensor:
    """(2, 3, size, size) noise in fp64: rounding does not hide a wrong name, nor pass for one in deep encoders."""
    return torch.randn(PICTURES, 3, size, size, generator=_generator(), dtype=torch.float64)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def features_before(encoder: PreTrainedModel, blocks: tuple[int, ...], **inputs: Tensor) -> dict[int, Tensor]:
    """Block -> (N, D) patches, by the code that training runs."""
    return encode_images(encoder, blocks, **inputs).by_block


@torch.no_grad()
def foreign_difference(encoder: PreTrainedModel, blocks: tuple[int, ...], foreign: Any) -> float:
    """Largest difference between an encoder and its form in another library, in fp64, at the encoder's own size.

    Args:
        encoder: as exported; it is fp64 afterwards.
        blocks: from 1.
        foreign: its form as timm or open_clip makes it, likewise. What it pools is compared with the encoder's pooled
            output or, if it has none, its mean patch.
    """
    encoder, foreign = encoder.double(), foreign.eval().double()
    pictures = square_pictures(encoder.config.image_size)
    before = features_before(encoder, blocks, pixel_values=pictures)
    indices = [block - 1 for block in blocks]
    after = foreign.forward_intermediates(pictures, indices=indices, output_fmt="NLC", intermediates_only=True)
    after = after["image_intermediates"] if isinstance(after, dict) else after  # open_clip's, timm's
    outputs = encoder(pictures)
    expected = outputs.pooler_output if outputs.pooler_output is not None else outputs.last_hidden_state.mean(1)
    pairs = [(before[block], one.flatten(0, 1)) for block, one in zip(blocks, after, strict=True)]
    return largest_difference([*pairs, (expected, foreign(pictures))])


def largest_difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Over all pairs; infinite where shapes differ."""
    return max(float((a - b).abs().max()) if a.shape == b.shape else float("inf") for a, b in pairs)


def check(difference: float, what: str) -> None:
    """Refuse an export whose features differ.

    Raises:
        HiveError: by more than `TOLERANCE`, or not a number.
    """
    if not difference <= TOLERANCE:
        raise HiveError(
            f"export to {what}: features read back differ by {difference:.1e}, expected at most {TOLERANCE:.0e}; "
            "nothing was exported"
        )


def check_names(missing: list[str], unexpected: list[str], what: str) -> None:
    """Refuse weights that another library's model does not load by name.

    Raises:
        HiveError: a name is missing or too many.
    """
    if missing or unexpected:
        raise HiveError(
            f"export to {what}: missing {missing}, unexpected {unexpected}; expected its names; nothing was exported"
        )
