"""Text and image tokens of a cascaded model in one sequence: which token stands where.

Axes: T text token, N patch of all images, S place in the sequences of all samples end to end, B row, W padded place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hive_ds.kernels import to_device


@dataclass(frozen=True)
class Interleaving:
    """Places of the tokens of a batch, on the CPU: what is chosen by them there, the host need not wait for.

    Attributes:
        source_S: row of [text tokens; patches] that stands at each place.
        text_T: place of each text token.
        positions_S: place in its own sample's sequence, from 0.
        lengths: tokens of each sample's sequence.
    """

    source_S: Tensor
    text_T: Tensor
    positions_S: Tensor
    lengths: list[int]

    @classmethod
    def build(
        cls,
        text_lengths: Sequence[int],
        image_lengths: Sequence[Sequence[int]],
        image_offsets: Sequence[Sequence[int]],
        *,
        keep_last: bool,
    ) -> Interleaving:
        """Put each image before the text token that its media offset counts to.

        Args:
            text_lengths: text tokens of each sample.
            image_lengths: patches of each image of each sample.
            image_offsets: media offset of each, in ascending order.
            keep_last: whether images after the last text token enter; no text token sees them, the next one will.
        """
        sources, lengths = [], []
        text_start, image_start = 0, sum(text_lengths)
        for length, patches, offsets in zip(text_lengths, image_lengths, image_offsets, strict=True):
            ranges = [
                (start, end)
                for start, end in _ranges(length, patches, offsets, text_start, image_start, keep_last)
                if end > start
            ]
            sources += [torch.arange(start, end) for start, end in ranges]
            lengths.append(sum(end - start for start, end in ranges))
            text_start += length
            image_start += sum(patches)
        source = torch.cat([torch.empty(0, dtype=torch.int64), *sources])
        positions = torch.cat([torch.empty(0, dtype=torch.int64), *map(torch.arange, lengths)])
        text = (source < sum(text_lengths)).nonzero()[:, 0]
        return cls(source, text, positions, lengths)

    def packed(self, device: torch.device) -> dict[str, Tensor]:
        """What tells an LLM of transformers where the samples of one packed row begin.

        The ids on ``device``, (1, S), for rotation; the bounds stay on the CPU, where our attention reads them.
        """
        bounds = torch.tensor([0, *self.lengths]).cumsum(0)
        return {"position_ids": to_device(self.positions_S, device)[None], "cu_seq_lens_q": bounds}

    def left_padded(self, states_SD: Tensor, text_T: Tensor, placeholder: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows padded on the left: states (B, W, D) and tokens (B, W), 0 at padding, and their mask (B, W) of int64.

        Args:
            states_SD: what stands at each place.
            text_T: the text tokens.
            placeholder: token of a patch, as a stock Llava reads it.

        Raises:
            ValueError: a row is empty.
        """
        if 0 in self.lengths:
            raise ValueError(f"prompt {self.lengths.index(0)} is empty; expected a token or an image at least")
        width, device = max(self.lengths, default=0), states_SD.device
        first = torch.tensor([width - length for length in self.lengths], device=device)
        mask = torch.arange(width, device=device) >= first[:, None]
        padded, tokens = states_SD.new_zeros(*mask.shape, states_SD.shape[1]), text_T.new_zeros(mask.shape)
        padded[mask] = states_SD
        named_T = torch.cat([text_T, text_T.new_tensor([placeholder])])
        tokens[mask] = named_T[to_device(self.source_S, device).clamp(max=len(text_T))]
        return padded, tokens, mask.long()


def _ranges(
    length: int, patches: Sequence[int], offsets: Sequence[int], text_start: int, image_start: int, keep_last: bool
) -> Iterator[tuple[int, int]]:
    """Ranges of rows of [text; patches] that make up one sample's sequence."""
    done = 0
    for count, offset in zip(patches, offsets, strict=True):
        if offset < length or keep_last:
            yield text_start + done, text_start + min(offset, length)
            yield image_start, image_start + count
            done = min(offset, length)
        image_start += count
    yield text_start + done, text_start + length
