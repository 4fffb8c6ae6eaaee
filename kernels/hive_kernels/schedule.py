"""A layout as the Triton kernels read it: int32 tables on the device, and lists of what each program does."""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .copies import to_device
from .padding import packed_starts, ragged_range

if TYPE_CHECKING:
    from .layout import AttentionLayout

Integers = npt.NDArray[np.int64]

NOT_LISTED = 2**31 - 1
"""First token that sees an image key of no sample of the layout (`AttentionLayout.select` left it out)."""


class Schedule:
    """Tables of one layout, made on first use and kept. Sequence lengths are in them and in no kernel's code.

    Work lists depend on the tiles as well, so there is one for each tile size asked for. They take the samples in turn,
    that with the most work first, so that the programs that run at one time read the same keys, from the L2 cache; and
    of a sample the longest piece of work first, so that the last programs to finish are short ones.
    """

    def __init__(self, layout: AttentionLayout) -> None:
        self._text = np.array(layout.text_lengths, dtype=np.int64)
        self._queries = np.array(layout.query_lengths, dtype=np.int64)
        self._first_query = np.array(packed_starts(layout.query_lengths), dtype=np.int64)
        self._patches = np.array([sum(lengths) for lengths in layout.image_lengths], dtype=np.int64)
        self._first_image = np.array(layout.image_starts, dtype=np.int64)
        counts = [len(lengths) for lengths in layout.image_lengths]
        self._image_sample = np.repeat(np.arange(len(counts)), counts)
        self._image_length = np.array(list(chain.from_iterable(layout.image_lengths)), dtype=np.int64)
        self._image_offset = np.array(list(chain.from_iterable(layout.image_offsets)), dtype=np.int64)
        self._num_image, self._device = layout.num_image, layout.device
        self._work: dict[tuple[str, int, int], Tensor] = {}

    @cached_property
    def samples(self) -> Tensor:
        """(B, 6): first row of q, rows of q, first text key, text keys, first image key, image keys of each sample."""
        first_text = np.cumsum(self._text) - self._text
        columns = (self._first_query, self._queries, first_text, self._text, self._first_image, self._patches)
        return self._on_device(np.stack(columns, axis=1))

    @cached_property
    def seen(self) -> Tensor:
        """(rows of q,): how many of its sample's image keys each query token sees; they are the first so many."""
        return self._on_device(self._seen)

    @cached_property
    def first_token(self) -> Tensor:
        """(N,): the first token of its sample that sees each image key, if the sample is so long."""
        table = np.full(self._num_image, NOT_LISTED, dtype=np.int64)
        start = self._first_image[self._image_sample] + self._within_sample
        table[ragged_range(start, self._image_length).numpy()] = np.repeat(self._image_offset, self._image_length)
        return self._on_device(table)

    @cached_property
    def text_bounds(self) -> Tensor:
        """(B + 1,): first text key of each sample, and the end of the last (cu_seqlens)."""
        return self._on_device(np.append(0, np.cumsum(self._text)))

    @cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all samples, of one head."""
        return int((self._queries * (2 * self._text - self._queries + 1) // 2).sum() + self._seen.sum())

    def row_work(self, pack: int, block: int) -> Tensor:
        """(tiles, 2): sample and tile of every ``block`` rows of a sample, ``pack`` rows (query heads) a token."""
        return self._kept("rows", pack, block)

    def key_work(self, block: int) -> Tensor:
        """(tiles, 3): sample, tile and 0 or 1 of every ``block`` text (0) or image (1) keys of a sample."""
        return self._kept("keys", 1, block)

    def sample_work(self) -> Tensor:
        """(B, 2): every sample, and 0."""
        return self._kept("samples", 1, 1)

    def _kept(self, kind: str, pack: int, block: int) -> Tensor:
        if (kind, pack, block) not in self._work:
            make = {"rows": self._row_work, "keys": self._key_work, "samples": self._sample_work}[kind]
            self._work[kind, pack, block] = self._on_device(make(pack, block))
        return self._work[kind, pack, block]

    def _row_work(self, pack: int, block: int) -> Integers:
        rows = self._queries * pack
        sample, tile = _tiles(rows, block)
        last = (np.minimum((tile + 1) * block, rows[sample]) - 1) // pack
        cost = (self._text - self._queries)[sample] + last + self._seen[self._first_query[sample] + last]
        return np.stack([sample, tile], axis=1)[_in_turn(sample, cost, len(rows))]

    def _key_work(self, _pack: int, block: int) -> Integers:
        text_sample, text_tile = _tiles(self._text, block)
        image_sample, image_tile = _tiles(self._patches, block)
        sample, tile = np.concatenate([text_sample, image_sample]), np.concatenate([text_tile, image_tile])
        is_image = np.arange(len(sample)) >= len(text_sample)
        cost = np.where(is_image, self._text[sample], self._text[sample] - tile * block)
        return np.stack([sample, tile, is_image], axis=1)[_in_turn(sample, cost, len(self._text))]

    def _sample_work(self, _pack: int, _block: int) -> Integers:
        order = np.argsort(-(self._text + self._patches), kind="stable")
        return np.stack([order, np.zeros_like(order)], axis=1)

    @cached_property
    def _within_sample(self) -> Integers:
        """First patch of each image, counted from its sample's first."""
        before = np.cumsum(self._image_length) - self._image_length
        return before - (np.cumsum(self._patches) - self._patches)[self._image_sample]

    @cached_property
    def _seen(self) -> Integers:
        seen = np.zeros(int(self._queries.sum()), dtype=np.int64)
        # Each image adds its patches to all tokens from its offset on: to one entry, before a running sum.
        cached = (self._text - self._queries)[self._image_sample]
        entry = np.maximum(self._image_offset - cached, 0)
        shown = entry < self._queries[self._image_sample]
        sample = self._image_sample[shown]
        np.add.at(seen, self._first_query[sample] + entry[shown], self._image_length[shown])
        running = np.cumsum(seen)
        return running - np.repeat(np.append(0, running)[self._first_query], self._queries)

    def _on_device(self, table: Integers) -> Tensor:
        # A tensor made under inference_mode could not be saved for a backward pass later.
        with torch.inference_mode(False):
            small = torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32))
            return to_device(small, self._device)


def _in_turn(sample: Integers, cost: Integers, samples: int) -> Integers:
    """Order of pieces of work: sample by sample, the most work first, and of a sample the most costly piece first."""
    turn = np.empty(samples, dtype=np.int64)
    turn[np.argsort(-np.bincount(sample, cost, samples), kind="stable")] = np.arange(samples)
    return np.lexsort((-cost, turn[sample]))


def _tiles(lengths: Integers, block: int) -> tuple[Integers, Integers]:
    """Sample and tile of every ``block`` of each of ``lengths``."""
    counts = -(-lengths // block)
    sample = np.repeat(np.arange(len(lengths)), counts)
    return sample, np.arange(len(sample)) - (np.cumsum(counts) - counts)[sample]
