"""Rows of a packed tensor laid out as one rectangle, and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def ragged_range(starts: npt.ArrayLike, lengths: npt.ArrayLike) -> Tensor:
    """``start, start + 1, ... start + length - 1`` of every pair, end to end: int64 (sum of lengths,) on the CPU."""
    first, counts = np.asarray(starts, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    shifts = first - (np.cumsum(counts) - counts)
    return torch.from_numpy(np.arange(counts.sum()) + np.repeat(shifts, counts))


def packed_starts(lengths: Sequence[int]) -> list[int]:
    """First row of each of several sequences laid end to end."""
    return [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]


class Padding:
    """Sequences of a packed tensor as a rectangle (count, width, ...), zeros past each sequence's length.

    Sequence ``i`` is the ``lengths[i]`` packed rows from ``starts[i]`` on; two sequences may share rows. Sequences of
    one length that follow each other need no copy: `pad` and `unpad` are then views. Otherwise indices are made once.
    """

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        self.count = len(starts)
        self.width = max(lengths, default=0)
        self._first = starts[0] if starts else 0
        self._rows = sum(lengths)
        self._slots: Tensor | None = None
        self._source: Tensor | None = None
        # Indices made under inference_mode could not serve a backward pass later.
        with torch.inference_mode(False):
            if any(length != self.width for length in lengths):
                self._slots = ragged_range([line * self.width for line in range(self.count)], lengths).to(device)
            if list(starts) != [self._first + before for before in packed_starts(lengths)]:
                self._source = ragged_range(starts, lengths).to(device)

    def pad(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (count, width, ...)."""
        rows = x.narrow(0, self._first, self._rows) if self._source is None else x.index_select(0, self._source)
        if self._slots is not None:
            # Zeros and not some other row: a NaN there would reach this sequence as 0 * NaN.
            blank = x.new_zeros(self.count * self.width, *x.shape[1:])
            rows = blank.index_copy_(0, self._slots, rows)
        return rows.reshape(self.count, self.width, *x.shape[1:])

    def unpad(self, rectangle: Tensor) -> Tensor:
        """(count, width, ...) -> (sum of lengths, ...), the sequences end to end."""
        flat = rectangle.flatten(0, 1)
        return flat if self._slots is None else flat.index_select(0, self._slots)
