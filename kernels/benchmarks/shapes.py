"""The shapes that are timed, and the least work each needs."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from hive_ds.kernels import AttentionLayout

DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Work:
    """The least that any implementation does: each input read once, each output written once."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Shape:
    """One batch. Lists as `AttentionLayout.build` takes them; every sample has the same images."""

    name: str
    title: str
    text: tuple[int, ...]
    images: tuple[int, ...]
    """Patches of each image of a sample."""
    offsets: tuple[int, ...]
    heads: int
    groups: int
    head_dim: int
    qk_norm: str = "pre_rope"
    decode: bool = False
    """One new token a sample against cached keys; forward only."""

    def layout(self, device: torch.device | str) -> AttentionLayout:
        """The batch as the kernels take it."""
        count = len(self.text)
        queries = [1] * count if self.decode else None
        return AttentionLayout.build(
            self.text, [self.images] * count, [self.offsets] * count, query_lengths=queries, device=device
        )

    @property
    def directions(self) -> tuple[str, ...]:
        """What can be timed."""
        return DIRECTIONS[:1] if self.decode else DIRECTIONS

    @property
    def pairs(self) -> int:
        """(query, key) pairs of which the query sees the key."""
        total = 0
        for text in self.text:
            first = text - 1 if self.decode else 0
            total += sum(range(first + 1, text + 1))
            total += sum(
                size * max(0, text - max(offset, first)) for size, offset in zip(self.images, self.offsets, strict=True)
            )
        return total

    def work(self, direction: str, dtype: torch.dtype) -> Work:
        """Bytes and operations of one direction: 4 or 10 operations a pair and channel, rotation tables in fp32."""
        if direction == "both":
            return self.work("forward", dtype) + self.work("backward", dtype)
        text, image = sum(self.text), sum(self.images) * len(self.text)
        queries = len(self.text) if self.decode else text
        rotated = queries if self.decode else text + image
        q_bytes = queries * self.heads * self.head_dim * dtype.itemsize
        key_bytes = 2 * (text + image) * self.groups * self.head_dim * dtype.itemsize
        tables = rotated * self.head_dim * 4
        lse = 0 if self.decode else queries * self.heads * 4
        products = self.heads * self.head_dim * self.pairs
        if direction == "forward":
            return Work(2 * q_bytes + key_bytes + tables + lse, 4 * products)
        return Work(4 * q_bytes + 2 * key_bytes + tables + lse, 10 * products)  # q, out and their gradients


def _mixed(count: int, low: int, high: int) -> tuple[int, ...]:
    draw = random.Random(0)
    return tuple(draw.randint(low, high) for _ in range(count))


_A = Shape("a", "captions (MobileLLM-600M)", (64,) * 64, (576,), (0,), 18, 6, 64, qk_norm="post_rope")
_B = Shape("b", "short dialogue (Qwen2-0.5B)", (256,) * 32, (729,), (0,), 14, 2, 64)
_C = Shape("c", "long dialogue (an 8B LLM)", (2048,) * 8, (1024,), (0,), 32, 8, 128)

SHAPES = {
    shape.name: shape
    for shape in (
        _A,
        _B,
        _C,
        replace(_A, name="a-middle", title="a, the image in mid-text", offsets=(32,)),
        replace(_A, name="a-mixed", title="a, captions of 8 to 128 tokens", text=_mixed(64, 8, 128)),
        replace(_A, name="a-two-images", title="a, two images a sample", images=(576, 576), offsets=(0, 32)),
        replace(_A, name="a-decode", title="a, one token against 128 cached", text=(128,) * 64, decode=True),
        replace(_C, name="c-decode", title="c, one token against 2048 cached", decode=True),
    )
}


def tiny(shape: Shape) -> Shape:
    """The same case in a size for a machine without a GPU: two samples, two key heads, few tokens."""
    text = (max(3, min(shape.text) // 16), max(3, max(shape.text) // 16))
    groups = 1 if shape.heads // shape.groups > 4 else 2
    return replace(
        shape,
        text=tuple(min(length, 20) for length in text),
        images=tuple(size // 64 for size in shape.images),
        offsets=tuple(offset // 16 for offset in shape.offsets),
        heads=groups * (shape.heads // shape.groups),
        groups=groups,
        head_dim=32,
    )
