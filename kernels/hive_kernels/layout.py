"""Which text token sees which keys: the packed batch described once, shared by all layers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from .copies import to_device
from .padding import Padding, packed_starts, ragged_range
from .rectangles import Rectangles
from .schedule import Schedule

NEVER = torch.iinfo(torch.int64).max
"""Media offset of a padding row among image keys: no token comes after it."""


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Lengths and media offsets of a packed batch, and the indices and mask made from them on first use.

    Make one with `build`, once a batch; then `advance` and `select` while decoding. Packed image keys go sample by
    sample, and within a sample in the order listed here.
    """

    text_lengths: list[int]
    """Text tokens of each sample; while decoding, cached and new ones."""
    image_lengths: list[list[int]]
    """Patches of each image of each sample."""
    image_offsets: list[list[int]]
    """Media offset of each image: the first text token of its sample that sees it."""
    query_lengths: list[int]
    """Tokens of each sample that q holds: its last ones."""
    image_starts: list[int]
    """Row of each sample's first image key among the packed image keys; samples made by `select` may share it."""
    num_image: int
    """Rows of the packed image keys (N)."""
    decoding: bool
    """Whether k, v, image_k and image_v come finished and q alone is normed and rotated."""
    device: torch.device

    @classmethod
    def build(
        cls,
        text_lengths: Sequence[int],
        image_lengths: Sequence[Sequence[int]],
        image_offsets: Sequence[Sequence[int]],
        query_lengths: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> AttentionLayout:
        """Describe a batch.

        Args:
            text_lengths: text tokens of each sample, 0 allowed; with ``query_lengths``, cached plus new tokens.
            image_lengths: patches (1 or more) of each image of each sample; ``[]`` for a sample without image.
            image_offsets: media offset of each image, counted in text tokens of its sample; within a sample they never
                decrease. An offset equal to the text length is seen by nothing; beyond it is for decoding only.
            query_lengths: decoding: how many of each sample's last tokens are in q.
            device: where q, k and v are.

        Raises:
            ValueError: lists that do not match, negative lengths, empty images, offsets out of range or decreasing.
        """
        text = [_count(f"text_lengths[{b}]", length, low=0) for b, length in enumerate(text_lengths)]
        for name, listed in (("image_lengths", image_lengths), ("image_offsets", image_offsets)):
            _require_entries(name, listed, len(text))
        images = [_image_lengths(b, row) for b, row in enumerate(image_lengths)]
        decoding = query_lengths is not None
        offsets = [
            _offsets(b, row, len(images[b]), None if decoding else text[b]) for b, row in enumerate(image_offsets)
        ]
        patches = [sum(row) for row in images]
        return cls(
            text_lengths=text,
            image_lengths=images,
            image_offsets=offsets,
            query_lengths=list(text) if query_lengths is None else _query_lengths(query_lengths, text),
            image_starts=packed_starts(patches),
            num_image=sum(patches),
            decoding=decoding,
            device=torch.empty(0, device=device).device,  # "cuda" becomes "cuda:0", as tensors say it
        )

    def advance(self, n: int) -> AttentionLayout:
        """The layout of the step that adds ``n`` (1 or more) tokens to every sample, q holding just those."""
        n = _count("n", n, low=1)
        text_lengths = [length + n for length in self.text_lengths]
        return replace(self, text_lengths=text_lengths, query_lengths=[n] * self.num_samples, decoding=True)

    def select(self, samples: Sequence[int] | Tensor) -> AttentionLayout:
        """The layout whose sample r is ``samples[r]`` of this one: beams of one prompt, or what is left of a batch.

        Image keys stay where they are, whole and uncopied; samples picked twice share them. Text (q, k and v) is the
        caller's to pick.

        Raises:
            ValueError: an index outside this layout, or no integer.
        """
        picked: list[int] = samples.tolist() if isinstance(samples, Tensor) else list(samples)
        for r, b in enumerate(picked):
            if _count(f"samples[{r}]", b, low=0) >= self.num_samples:
                raise ValueError(f"samples[{r}] is {b}; expected a sample of this layout, 0 to {self.num_samples - 1}")
        return replace(
            self,
            text_lengths=[self.text_lengths[b] for b in picked],
            image_lengths=[self.image_lengths[b] for b in picked],
            image_offsets=[self.image_offsets[b] for b in picked],
            query_lengths=[self.query_lengths[b] for b in picked],
            image_starts=[self.image_starts[b] for b in picked],
        )

    @property
    def num_samples(self) -> int:
        """Samples in the batch (B)."""
        return len(self.text_lengths)

    @cached_property
    def num_text(self) -> int:
        """Text tokens of all samples, cached ones included (T): rows of packed k and v."""
        return sum(self.text_lengths)

    @cached_property
    def num_queries(self) -> int:
        """Rows of q."""
        return sum(self.query_lengths)

    @cached_property
    def min_text(self) -> int:
        """Text tokens of the shortest sample."""
        return min(self.text_lengths, default=0)

    @cached_property
    def max_text(self) -> int:
        """Text tokens of the longest sample."""
        return max(self.text_lengths, default=0)

    @cached_property
    def max_queries(self) -> int:
        """Rows of q of the sample that has most."""
        return max(self.query_lengths, default=0)

    @cached_property
    def seen_lengths(self) -> list[int]:
        """Image keys of each sample that at least one row of q sees: the first so many of its own."""
        return [
            sum(length for length, offset in zip(lengths, offsets, strict=True) if offset < text) if queries else 0
            for lengths, offsets, text, queries in zip(
                self.image_lengths, self.image_offsets, self.text_lengths, self.query_lengths, strict=True
            )
        ]

    @property
    def max_seen(self) -> int:
        """Most image keys that a sample's queries see; 0 when no image is seen at all."""
        return max(self.seen_lengths, default=0)

    @cached_property
    def query_rows(self) -> Padding:
        """q as (B, max_queries, ...)."""
        return Padding(packed_starts(self.query_lengths), self.query_lengths, self.device)

    @cached_property
    def text_rows(self) -> Padding:
        """Packed k or v as (B, max_text, ...)."""
        return Padding(packed_starts(self.text_lengths), self.text_lengths, self.device)

    @cached_property
    def image_rows(self) -> Padding:
        """Packed image keys as (U, max_seen, ...), each line shared by B / U samples in a row."""
        spans = list(zip(self.image_starts, self.seen_lengths, strict=True))
        runs = [(span, len(list(run))) for span, run in groupby(spans)]
        if len({count for _, count in runs}) == 1:
            spans = [span for span, _ in runs]
        return Padding([start for start, _ in spans], [length for _, length in spans], self.device)

    @cached_property
    def rectangles(self) -> Rectangles:
        """Whole texts laid out for the CPU path."""
        return Rectangles(self)

    @cached_property
    def schedule(self) -> Schedule:
        """What the Triton kernels read."""
        return Schedule(self)

    @cached_property
    def shares_images(self) -> bool:
        """Whether image keys belong to several samples, or to none, as `select` may have it."""
        patches = [sum(lengths) for lengths in self.image_lengths]
        return self.image_starts != packed_starts(patches) or self.num_image != sum(patches)

    @cached_property
    def unshared(self) -> tuple[Tensor, AttentionLayout]:
        """Rows that give every sample image keys of its own, sample by sample, and the layout of these keys."""
        patches = [sum(lengths) for lengths in self.image_lengths]
        with torch.inference_mode(False):
            rows = to_device(ragged_range(self.image_starts, patches), self.device)
        return rows, replace(self, image_starts=packed_starts(patches), num_image=sum(patches))

    @cached_property
    def stale_rows(self) -> Tensor:
        """Rows of a padded cache, from the shortest sample's length on, that are past their own sample's length.

        bool (B, max_text - min_text, 1, 1).
        """
        with torch.inference_mode(False):
            row = torch.arange(self.min_text, self.max_text, device=self.device)
            return (row >= self._column(self.text_lengths))[:, :, None, None]

    @cached_property
    def is_causal(self) -> bool:
        """Whether plain causal masking over equally long texts says it all."""
        return self.max_seen == 0 and self.min_text == self.max_text and self.query_lengths == self.text_lengths

    @cached_property
    def mask(self) -> Tensor | None:
        """True where a row of q sees a key, over (B, 1, max_queries, max_text + max_seen); None where all is seen.

        Padding rows of q see what their sample's last token sees, so that no row sees nothing.
        """
        if self._sees_everything():
            return None
        with torch.inference_mode(False):
            length = self._column(self.text_lengths)
            first = length - self._column(self.query_lengths)
            position = torch.arange(self.max_queries, device=self.device) + first
            position = position.minimum(length - 1).clamp_(min=0)[:, :, None]
            text = torch.arange(self.max_text, device=self.device) <= position
            if self.max_seen == 0:
                return text[:, None]
            return torch.cat([text, self.padded_offsets[:, None] <= position], dim=2)[:, None]

    def _column(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)[:, None]

    def _sees_everything(self) -> bool:
        if any(n != 1 for n in self.query_lengths) or self.min_text != self.max_text:
            return False
        return all(seen == self.max_seen for seen in self.seen_lengths)

    @cached_property
    def padded_offsets(self) -> Tensor:
        """Media offset of every seen image key, (B, max_seen), NEVER in the padding."""
        offsets, lengths = [], []
        for row_offsets, row_lengths, text, seen in zip(
            self.image_offsets, self.image_lengths, self.text_lengths, self.seen_lengths, strict=True
        ):
            shown = [pair for pair in zip(row_offsets, row_lengths, strict=True) if seen and pair[0] < text]
            offsets += [offset for offset, _ in shown]
            lengths += [length for _, length in shown]
        table = torch.full((self.num_samples * self.max_seen,), NEVER)
        lines = range(0, self.num_samples * self.max_seen, self.max_seen)
        table[ragged_range(lines, self.seen_lengths)] = torch.tensor(offsets).repeat_interleave(torch.tensor(lengths))
        return table.view(self.num_samples, self.max_seen).to(self.device)


def _count(name: str, value: int, low: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < low:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {low}")
    return operator.index(value)


def _require_entries(name: str, listed: Sequence[object], expected: int) -> None:
    if len(listed) != expected:
        raise ValueError(f"{name} has {len(listed)} entries; expected {expected}, one per entry of text_lengths")


def _image_lengths(b: int, lengths: Sequence[int]) -> list[int]:
    return [_count(f"image_lengths[{b}][{i}]", length, low=1) for i, length in enumerate(lengths)]


def _offsets(b: int, offsets: Sequence[int], num_images: int, limit: int | None) -> list[int]:
    """Offsets of one sample, checked; ``limit`` is its text length, None while decoding."""
    if len(offsets) != num_images:
        raise ValueError(
            f"image_offsets[{b}] has {len(offsets)} entries; expected {num_images} as in image_lengths[{b}]"
        )
    checked: list[int] = []
    for i, offset in enumerate(offsets):
        name, low = f"image_offsets[{b}][{i}]", checked[-1] if checked else 0
        if _count(name, offset, low=0) < low:
            raise ValueError(f"{name} is {offset}; expected at least {low}, the offset of the image before it")
        if limit is not None and offset > limit:
            raise ValueError(f"{name} is {offset}; expected at most {limit}, the sample's text length")
        checked.append(operator.index(offset))
    return checked


def _query_lengths(lengths: Sequence[int], text: list[int]) -> list[int]:
    _require_entries("query_lengths", lengths, len(text))
    checked = [_count(f"query_lengths[{b}]", length, low=0) for b, length in enumerate(lengths)]
    for b, (queries, total) in enumerate(zip(checked, text, strict=True)):
        if queries > total:
            raise ValueError(f"query_lengths[{b}] is {queries}; expected at most {total}, text_lengths[{b}]")
    return checked
