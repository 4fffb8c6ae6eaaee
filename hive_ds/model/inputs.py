"""A batch on its way through the model: packed text, the images of each prompt, and the attention contexts.

Axes: B row, S slot of a padded row, T text token, N image token, D model, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hive_ds.constants import IGNORE_INDEX
from hive_ds.kernels import AttentionLayout, to_device
from hive_ds.model.positions import Grid, Positions, RotaryFrequencies, build_positions
from hive_ds.model.vision import VisionFeatures, encode_images


@dataclass(frozen=True)
class PackedText:
    """Tokens of all rows end to end.

    Attributes:
        input_ids_T: (T,) tokens.
        lengths: tokens of each row.
        mask_BS: where the tokens stood if the caller's batch was padded, else None.
    """

    input_ids_T: Tensor
    lengths: list[int]
    mask_BS: Tensor | None

    @classmethod
    def from_packed(cls, input_ids: Tensor, lengths: Sequence[int] | None) -> PackedText:
        """From tokens that are already end to end.

        Raises:
            ValueError: the lengths are missing or do not add up to the number of tokens.
        """
        if lengths is None or sum(lengths) != len(input_ids):
            raise ValueError(
                f"text_lengths is {None if lengths is None else list(lengths)}; with packed input_ids of "
                f"{len(input_ids)} tokens it must list the samples' lengths, {len(input_ids)} in sum"
            )
        return cls(input_ids, list(lengths), None)

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor | None) -> PackedText:
        """From (B, S) tokens and a mask that is 1 on tokens; a longer mask counts cached tokens first.

        Raises:
            ValueError: the mask has another number of rows, or fewer columns.
        """
        if attention_mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            given, expected = tuple(attention_mask.shape), tuple(input_ids.shape)
            if len(given) != 2 or given[0] != expected[0] or given[1] < expected[1]:
                raise ValueError(
                    f"attention_mask is of shape {given}; expected {expected}, that of input_ids, or wider"
                )
            mask = attention_mask[:, -input_ids.shape[1] :].to(torch.bool)
        return cls(input_ids[mask], mask.sum(dim=1).tolist(), mask)

    def supervised(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Positions that predict a token which counts, and these tokens, (R,) each. None crosses a sample's end.

        Raises:
            ValueError: the labels have another shape than the caller's batch.
        """
        packed = self.packed(labels)
        targets = torch.full_like(packed, IGNORE_INDEX)
        targets[:-1] = packed[1:]
        ends = torch.tensor(self.lengths).cumsum(0)
        targets[ends[ends > 0].to(targets.device) - 1] = IGNORE_INDEX
        rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
        device = self.input_ids_T.device
        return to_device(rows, device), to_device(targets[rows], device)

    def packed(self, values: Tensor) -> Tensor:
        """Labels shaped as the caller's batch, end to end (T,), on their device; ValueError for another shape."""
        expected = (self.input_ids_T if self.mask_BS is None else self.mask_BS).shape
        if values.shape != expected:
            raise ValueError(
                f"labels are of shape {tuple(values.shape)}; expected {tuple(expected)}, that of input_ids"
            )
        return values if self.mask_BS is None else values[self.mask_BS.to(values.device)]

    def padded(self, values_T: Tensor) -> Tensor:
        """Values of all tokens (T, ...) back in their slots (B, S, ...), zeros elsewhere; packed text stays packed."""
        if self.mask_BS is None:
            return values_T
        output = values_T.new_zeros(*self.mask_BS.shape, *values_T.shape[1:])
        output[self.mask_BS] = values_T
        return output


@dataclass(frozen=True)
class PromptImages:
    """Encoded images of a batch of prompts.

    Attributes:
        features: block number -> (N, D_vision) features of all images, prompt by prompt.
        grids: (rows, columns) of each image of each prompt.
        offsets: media offset of each image of each prompt, ascending.
    """

    features: dict[int, Tensor]
    grids: list[list[Grid]]
    offsets: list[list[int]]

    @classmethod
    def build(cls, encoded: VisionFeatures, offsets: Sequence[Sequence[int]]) -> PromptImages:
        """Share the encoded images out to the prompts.

        Raises:
            ValueError: the offsets list another number of images, or those of a prompt are not whole numbers in
                ascending order.
        """
        rows = [_offsets_of_row(prompt, one) for prompt, one in enumerate(offsets)]
        listed = sum(len(one) for one in rows)
        if listed != len(encoded.grids):
            raise ValueError(f"image_offsets lists {listed} images; pixel_values holds {len(encoded.grids)}")
        for prompt, one in enumerate(rows):
            if one != sorted(one):
                raise ValueError(f"image_offsets of row {prompt} are {one}; they must be in ascending order")
        grids = iter(encoded.grids)
        return cls(encoded.by_block, [[next(grids) for _ in one] for one in rows], rows)

    @classmethod
    def encode(
        cls,
        encoder: PreTrainedModel,
        blocks: Sequence[int],
        pixel_values: Tensor | None,
        offsets: Sequence[Sequence[int]] | None,
        prompts: int,
        *,
        pixel_attention_mask: Tensor | None,
        spatial_shapes: Tensor | None,
    ) -> PromptImages:
        """Run the encoder over the images of ``prompts`` prompts; None of ``pixel_values``, or 0 images, is no image.

        Args:
            encoder, blocks, pixel_values, pixel_attention_mask, spatial_shapes: as in `encode_images`.
            offsets: media offset of each image of each prompt, ascending.
            prompts: how many there are.

        Raises:
            ValueError: pixels without offsets or offsets without pixels, numbers of prompts or images that differ, or
                offsets that are not in ascending order.
            HiveError: the images do not fit the encoder.
        """
        if pixel_values is None:
            if offsets is not None and any(len(one) for one in offsets):
                raise ValueError("image_offsets lists images but pixel_values is None; give both or neither")
            return cls.none(prompts)
        if offsets is None or len(offsets) != prompts:
            raise ValueError(
                f"image_offsets is {offsets}; with pixel_values it must be a list of offsets for each of the "
                f"{prompts} rows"
            )
        if not len(pixel_values):  # which few encoders take
            return cls.build(VisionFeatures({}, []), offsets)
        encoded = encode_images(
            encoder,
            blocks,
            pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
        )
        return cls.build(encoded, offsets)

    @classmethod
    def none(cls, prompts: int) -> PromptImages:
        """No image in any of ``prompts`` prompts."""
        return cls({}, [[] for _ in range(prompts)], [[] for _ in range(prompts)])

    @property
    def is_empty(self) -> bool:
        """Whether no prompt has an image."""
        return not any(self.offsets)

    def prompt_of_row(self, rows: int) -> list[int]:
        """The prompt that each of ``rows`` rows continues: equally many rows for each, prompt by prompt."""
        rows_per_prompt = rows // max(len(self.grids), 1)
        return [row // rows_per_prompt for row in range(rows)]


def _offsets_of_row(row: int, given: Any) -> list[int]:
    """Media offsets of a row's images, in whatever sequence of whole numbers; ValueError for another value."""
    try:
        found = [index(offset) for offset in given]
    except TypeError:
        found = [-1]
    if min(found, default=0) < 0:
        raise ValueError(f"image_offsets of row {row} are {given!r}; expected whole numbers from 0, one an image")
    return found


@dataclass(frozen=True)
class AttentionContext:
    """What layers with one number of routed blocks share.

    Attributes:
        layout: who sees whom.
        interleave: (N * blocks,) order that turns [block 1 of all images; block 2 ...] into image by image, or None.
        image_cos_NK, image_sin_NK: rotation of those keys.
    """

    layout: AttentionLayout
    interleave: Tensor | None
    image_cos_NK: Tensor | None
    image_sin_NK: Tensor | None


@dataclass(frozen=True)
class BatchContext:
    """Everything about a batch that all layers share: text rotation and one `AttentionContext` per block count."""

    cos_TK: Tensor
    sin_TK: Tensor
    by_blocks: dict[int, AttentionContext]

    @classmethod
    def build(
        cls,
        images: PromptImages,
        prompt_of_row: Sequence[int],
        text_lengths: Sequence[int],
        *,
        block_counts: set[int],
        frequencies: RotaryFrequencies,
        rope: str,
        query_lengths: Sequence[int] | None,
        images_cached: bool,
        device: torch.device,
    ) -> BatchContext:
        """Positions, tables and layouts.

        Args:
            images: images of the prompts.
            prompt_of_row: prompt that each row continues; several rows share their prompt's image keys.
            text_lengths: text tokens of each row, cached ones included.
            block_counts: numbers of blocks routed to a layer; 0 (an un-routed layer) is always built.
            frequencies: the LLM's rotary frequencies.
            rope: positions of image patches.
            query_lengths: new tokens of each row if earlier ones are cached.
            images_cached: so are the images' keys, and nothing is made for them.
            device: of all tensors.
        """
        row_grids = [images.grids[prompt] for prompt in prompt_of_row]
        row_offsets = [images.offsets[prompt] for prompt in prompt_of_row]
        text = build_positions(text_lengths, row_grids, row_offsets, rope=rope, query_lengths=query_lengths)
        no_text = [0] * len(images.grids)
        patches = PromptImages.none(0) if images_cached else images
        image_N3 = build_positions(no_text[: len(patches.grids)], patches.grids, patches.offsets, rope=rope).image_N3
        tables = frequencies.tables(Positions(text.text_T, image_N3), device)
        contexts = {}
        for count in block_counts | {0}:
            interleave = _interleave(images.grids, count, device) if count > 1 and not images_cached else None
            cos, sin = tables.image_cos_NK, tables.image_sin_NK
            if interleave is not None:
                cos, sin = (table[interleave % len(table)] for table in (cos, sin))
            layout = _layout(images, prompt_of_row, text_lengths, count, query_lengths, device)
            contexts[count] = AttentionContext(layout, interleave, cos if count else None, sin if count else None)
        return cls(tables.cos_TK, tables.sin_TK, contexts)


def _layout(
    images: PromptImages,
    prompt_of_row: Sequence[int],
    text_lengths: Sequence[int],
    count: int,
    query_lengths: Sequence[int] | None,
    device: torch.device,
) -> AttentionLayout:
    """Layout of the rows when every image has ``count`` keys per patch."""
    first_row = [prompt_of_row.index(prompt) for prompt in range(len(images.grids))]
    layout = AttentionLayout.build(
        [text_lengths[row] for row in first_row],
        [[rows * columns * count for rows, columns in grids] if count else [] for grids in images.grids],
        [one if count else [] for one in images.offsets],
        query_lengths=None if query_lengths is None else [query_lengths[row] for row in first_row],
        device=device,
    )
    if len(prompt_of_row) == len(first_row):
        return layout
    own = text_lengths if query_lengths is None else query_lengths
    return replace(layout.select(prompt_of_row), text_lengths=list(text_lengths), query_lengths=list(own))


def _interleave(grids: Sequence[Sequence[Grid]], count: int, device: torch.device) -> Tensor:
    """Order that gathers, image by image, its patches of block 1, of block 2, and so on."""
    lengths = [rows * columns for one in grids for rows, columns in one]
    total, start = sum(lengths), 0
    order: list[Tensor] = []
    for length in lengths:
        order.extend(torch.arange(start, start + length) + block * total for block in range(count))
        start += length
    return to_device(torch.cat([torch.empty(0, dtype=torch.int64), *order]), device)
