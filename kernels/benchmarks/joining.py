"""How code without a kernel for two key sources brings text and image keys together. Built once a layout."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout


@dataclass
class Piece:
    """Consecutive queries of one sample and the keys they see: the last of them sees all, each other one key less."""

    first: int
    last: int
    key_rows: list[int]
    """Rows of the packed text keys followed by the packed image keys."""
    num_images: int
    """How many of ``key_rows`` are image keys."""


def pieces(layout: AttentionLayout) -> list[Piece]:
    """Every sample's queries, cut where an image begins to be seen, with their keys in media order."""
    found = []
    first_text = 0
    for b, text in enumerate(layout.text_lengths):
        first = text - layout.query_lengths[b]
        images = list(zip(layout.image_lengths[b], layout.image_offsets[b], strict=True))
        cuts = sorted({first, text, *(offset for _, offset in images if first < offset < text)})
        for begin, end in pairwise(cuts):
            rows: list[int] = []
            image_row, token = layout.num_text + layout.image_starts[b], 0
            for size, offset in images:
                if offset <= begin:
                    rows += range(first_text + token, first_text + offset)
                    rows += range(image_row, image_row + size)
                    token = offset
                image_row += size
            rows += range(first_text + token, first_text + end)
            num_images = sum(row >= layout.num_text for row in rows)
            found.append(Piece(begin, end, rows, num_images))
        first_text += text
    return found


@dataclass
class Varlen:
    """Arguments of a variable-length attention call, and the rows that its keys are gathered from."""

    query_lengths: list[int]
    key_lengths: list[int]
    rows: list[int]
    """Source row of every key."""
    num_sources: int
    device: torch.device

    def __post_init__(self) -> None:
        # All once a layout: neither timed nor compiled code shall make them.
        self.max_q, self.max_k = max(self.query_lengths), max(self.key_lengths)
        self.cu_q, self.cu_k = (_cumulative(x, self.device) for x in (self.query_lengths, self.key_lengths))
        self.gather = self._gather()
        """`Gather`'s two index tables; None where the keys are the sources as they stand."""

    @classmethod
    def joint(cls, layout: AttentionLayout) -> Varlen:
        """One call over text and image keys in media order, with bottom-right causal pieces."""
        found = pieces(layout)
        rows = [row for piece in found for row in piece.key_rows]
        lengths = [len(piece.key_rows) for piece in found]
        sources = layout.num_text + layout.num_image
        return cls([piece.last - piece.first for piece in found], lengths, rows, sources, layout.device)

    @classmethod
    def text(cls, layout: AttentionLayout) -> Varlen:
        """The call over text keys alone."""
        rows = list(range(layout.num_text))
        return cls(layout.query_lengths, layout.text_lengths, rows, layout.num_text, layout.device)

    @classmethod
    def image(cls, layout: AttentionLayout) -> Varlen:
        """The call over image keys alone, all of a piece's seen at once."""
        found = pieces(layout)
        rows = [row - layout.num_text for piece in found for row in piece.key_rows if row >= layout.num_text]
        lengths = [piece.num_images for piece in found]
        return cls([piece.last - piece.first for piece in found], lengths, rows, layout.num_image, layout.device)

    def _gather(self) -> tuple[Tensor, Tensor] | None:
        if self.rows == list(range(self.num_sources)):
            return None
        used: list[list[int]] = [[] for _ in range(self.num_sources)]
        for key, row in enumerate(self.rows):
            used[row].append(key)
        width = max(map(len, used))
        back = torch.tensor([keys + [-1] * (width - len(keys)) for keys in used])
        return torch.tensor(self.rows).to(self.device), back.to(self.device)


class Gather(torch.autograd.Function):
    """``x[rows]``, whose gradient is gathered too: each source row is used a few times, and atomics would be slow."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        """(sources, G, K) -> (keys, G, K)."""
        ctx.save_for_backward(back)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """(keys, G, K) -> (sources, G, K)."""
        (back,) = ctx.saved_tensors  # type: ignore[attr-defined]
        parts = []
        for column in back.unbind(1):
            rows = gradient.index_select(0, column.clamp(min=0))
            parts.append(torch.where((column >= 0)[:, None, None], rows, 0))
        return sum(parts[1:], parts[0]), None, None


def first_queries(layout: AttentionLayout) -> Tensor:
    """First text position that sees each key, images before text: int64 (B, images' keys + max_text).

    Padding behind a sample's text counts as text, which none of its queries reaches. Needs as many image keys in every
    sample.
    """
    lines = [
        [offset for size, offset in zip(sizes, offsets, strict=True) for _ in range(size)]
        + list(range(layout.max_text))
        for sizes, offsets in zip(layout.image_lengths, layout.image_offsets, strict=True)
    ]
    return torch.tensor(lines, device=layout.device)


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
