"""Position ids of text and image tokens, and their rotary tables.

Text keeps the LLM's own 1-D positions; an image advances the positions after it. With ``rope="2d"`` image patches
carry (row, column, time) ids and split the rotary frequencies among the three; with ``"1d"`` they are numbered one
after another, as in the paper's code (arXiv 2604.00086).

Axes: T text token, N image token, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hive_ds.kernels import to_device

Grid = tuple[int, int]
"""Patches of an image: (rows, columns)."""
ROPES = ("2d", "1d")
"""Ways to number the patches of an image, as above."""


@dataclass(frozen=True)
class Positions:
    """Position ids of a packed batch.

    Attributes:
        text_T: (T,) int64, one id per query token.
        image_N3: (N, 3) int64, (row, column, time) of each patch.
    """

    text_T: Tensor
    image_N3: Tensor


def image_advance(grid: Grid, rope: str) -> int:
    """How far one image moves the positions of the text after it."""
    rows, columns = grid
    return max(rows, columns) if rope == "2d" else rows * columns


def build_positions(
    text_lengths: Sequence[int],
    image_grids: Sequence[Sequence[Grid]],
    image_offsets: Sequence[Sequence[int]],
    *,
    rope: str = "2d",
    query_lengths: Sequence[int] | None = None,
) -> Positions:
    """Position ids from lengths, offsets and grids, on the CPU.

    Args:
        text_lengths: text tokens of each sample (cached ones included).
        image_grids: (rows, columns) of each image of each sample.
        image_offsets: text index that each image stands before, ascending; an image at or past the end moves nothing.
        rope: one of `ROPES`.
        query_lengths: if given, text ids cover only the last ``query_lengths[b]`` tokens of each sample.
    """
    # Counted with NumPy: a batch of hundreds of images is a thousand tiny arrays, made while the device waits.
    text_ids, image_ids = [np.empty(0, np.int64)], [np.empty((0, 3), np.int64)]
    for sample, (length, grids, offsets) in enumerate(zip(text_lengths, image_grids, image_offsets, strict=True)):
        ids = np.arange(length)
        advance = 0
        for grid, offset in zip(grids, offsets, strict=True):
            image_ids.append(_patch_ids(grid, rope) + (offset + advance))
            step = image_advance(grid, rope)
            ids[offset:] += step
            advance += step
        text_ids.append(ids if query_lengths is None else ids[length - query_lengths[sample] :])
    text, image = (torch.from_numpy(np.concatenate(ids)) for ids in (text_ids, image_ids))
    return Positions(text, image)


@lru_cache(maxsize=4096)
def _patch_ids(grid: Grid, rope: str) -> np.ndarray[Any, Any]:
    """Ids (rows * columns, 3) of an image at the start of a text."""
    rows, columns = grid
    if rope == "1d":
        return np.repeat(np.arange(rows * columns)[:, None], 3, axis=1)
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.stack([row, column, np.full_like(row, max(rows, columns) // 2)], axis=1)


def frequency_axes(num_frequencies: int) -> Tensor:
    """Which id each rotary frequency reads: 0 row, 1 column, 2 time. Shape (num_frequencies,), int64.

    The first 3K/8 of the K/2 frequencies (rounded down to even) alternate row and column, the rest take time:
    12/12/8 at K = 64.
    """
    spatial = (3 * num_frequencies // 4) // 2 * 2
    axes = torch.full((num_frequencies,), 2)
    axes[:spatial] = torch.arange(spatial) % 2
    return axes


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of a packed batch, fp32: text (T, K/2) and image (N, K/2), the K/2 frequencies once."""

    cos_TK: Tensor
    sin_TK: Tensor
    image_cos_NK: Tensor
    image_sin_NK: Tensor


class RotaryFrequencies:
    """The LLM's own rotary frequencies and scaling, kept in fp32.

    A plain object and not a buffer: casting a model to bf16 also casts its buffers, and positions past 256 would then
    collide.
    """

    def __init__(self, rotary_embedding: Any) -> None:
        """Read the frequencies of a Hugging Face rotary module by building it afresh on the CPU."""
        with torch.device("cpu"):
            fresh = type(rotary_embedding)(config=rotary_embedding.config)
        self.inv_freq: Tensor = fresh.inv_freq.detach().float()
        self.attention_scaling = float(fresh.attention_scaling)

    def tables(self, positions: Positions, device: torch.device) -> RotaryTables:
        """Rotary tables of ``positions``, on ``device``."""
        inv_freq, axes, text_T, image_N3 = (
            to_device(x, device)
            for x in (self.inv_freq, frequency_axes(len(self.inv_freq)), positions.text_T, positions.image_N3)
        )
        text = text_T[:, None].float() * inv_freq
        image = image_N3[:, axes].float() * inv_freq
        return RotaryTables(
            text.cos() * self.attention_scaling,
            text.sin() * self.attention_scaling,
            image.cos() * self.attention_scaling,
            image.sin() * self.attention_scaling,
        )
