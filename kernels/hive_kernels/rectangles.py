"""A packed batch as several rectangles, one for each run of samples that are about as long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .padding import packed_starts, ragged_range

if TYPE_CHECKING:
    from .layout import AttentionLayout

PAIRS_OF_A_RUN = 2**12
"""Padded (query, key) pairs of one head that cost as much as one rectangle more."""


@dataclass(frozen=True)
class Run:
    """Samples in a row that share a rectangle."""

    samples: range
    queries: int
    """Of the sample that has most, which sees as many text keys."""
    image_keys: int
    """Of the sample that sees most."""

    @property
    def keys(self) -> int:
        """Lines of the rectangle of keys, text first."""
        return self.queries + self.image_keys

    @property
    def pairs(self) -> int:
        """Queries times keys, padding included."""
        return len(self.samples) * self.queries * self.keys

    def joined(self, sample: int, queries: int, image_keys: int) -> Run:
        """With the next sample."""
        first = self.samples.start
        return Run(range(first, sample + 1), max(self.queries, queries), max(self.image_keys, image_keys))


def find_runs(layout: AttentionLayout) -> list[Run]:
    """Cut the batch where padding would cost more than another rectangle; samples sorted by length are cut best."""
    runs: list[Run] = []
    for sample, (queries, seen) in enumerate(zip(layout.text_lengths, layout.seen_lengths, strict=True)):
        alone = Run(range(sample, sample + 1), queries, seen)
        joined = runs[-1].joined(sample, queries, seen) if runs else alone
        if runs and joined.pairs - runs[-1].pairs - alone.pairs <= PAIRS_OF_A_RUN:
            runs[-1] = joined
        else:
            runs.append(alone)
    return runs


class Rectangles:
    """Where the rows of a packed batch stand in its rectangles, which lie end to end in one tensor.

    Args:
        layout: of whole texts (no cache), whose image keys belong to one sample each. It keeps this object, which
            does not keep it: in a circle, the tables of a batch would stay until Python's next collection.
    """

    def __init__(self, layout: AttentionLayout) -> None:
        self.runs = find_runs(layout)
        self.shape = [size for run in self.runs for size in (len(run.samples), run.queries, run.keys)]
        """Samples, queries and keys of each rectangle, as `rectangle_op.rectangle_attention` takes them."""
        self.num_queries = sum(len(run.samples) * run.queries for run in self.runs)
        self.num_keys = sum(len(run.samples) * run.keys for run in self.runs)
        text, seen = layout.text_lengths, layout.seen_lengths
        queries = packed_starts([run.queries for run in self._run_of_each])
        keys = packed_starts([run.keys for run in self._run_of_each])
        images = [start + run.queries for start, run in zip(keys, self._run_of_each, strict=True)]
        device = layout.device
        with torch.inference_mode(False):
            is_full = self.num_queries == layout.num_text
            self._slots = None if is_full else ragged_range(queries, text).to(device)
            self._key_slots = torch.cat([ragged_range(keys, text), ragged_range(images, seen)]).to(device)
            all_seen = sum(seen) == layout.num_image
            self._seen = None if all_seen else ragged_range(layout.image_starts, seen).to(device)
        self._masks: dict[torch.dtype, Tensor] = {}

    def pad(self, queries: Tensor) -> Tensor:
        """(T, ...) -> (num_queries, ...), zeros past the end of a text."""
        if self._slots is None:
            return queries.contiguous()
        return queries.new_zeros(self.num_queries, *queries.shape[1:]).index_copy_(0, self._slots, queries)

    def unpad(self, rows: Tensor) -> Tensor:
        """(num_queries, ...) -> (T, ...)."""
        return rows if self._slots is None else rows.index_select(0, self._slots)

    def join(self, text: Tensor, image: Tensor | None) -> Tensor:
        """Keys or values (T, ...) and (N, ...) -> (num_keys, ...), zeros where there are none."""
        if image is not None and self._seen is not None:
            image = image.index_select(0, self._seen)
        rows = text if image is None else torch.cat([text, image])
        return text.new_zeros(self.num_keys, *text.shape[1:]).index_copy_(0, self._key_slots[: len(rows)], rows)

    def mask(self, layout: AttentionLayout, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, else -inf; (samples, queries, keys) of every rectangle with images, end to end.

        ``layout`` is the one that this object was made from. Padding queries see what their text's last token sees, so
        that no query sees nothing.
        """
        if dtype not in self._masks:
            with torch.inference_mode(False):
                hidden = [~_seen_in(run, layout).flatten() for run in self.runs if run.image_keys]
                blank = torch.zeros(sum(map(len, hidden)), dtype=dtype, device=layout.device)
                self._masks[dtype] = blank.masked_fill_(torch.cat(hidden), float("-inf")) if hidden else blank
        return self._masks[dtype]

    @property
    def _run_of_each(self) -> list[Run]:
        """The run of each sample."""
        return [run for run in self.runs for _ in run.samples]


def _seen_in(run: Run, layout: AttentionLayout) -> Tensor:
    rows, device = slice(run.samples.start, run.samples.stop), layout.device
    last = torch.tensor(layout.text_lengths[rows], device=device)[:, None] - 1
    position = torch.arange(run.queries, device=device).minimum(last).clamp_(min=0)[:, :, None]
    text = torch.arange(run.queries, device=device) <= position
    return torch.cat([text, layout.padded_offsets[rows, None, : run.image_keys] <= position], dim=2)
