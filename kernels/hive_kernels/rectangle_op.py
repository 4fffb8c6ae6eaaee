"""Attention over the rectangles of a packed batch on CPUs: one op of torch.library, with the FLOPs of what is seen.

Inside is torch's own flash kernel for CPUs, once a rectangle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .library import count_flops, differentiable
from .padded_op import flash, flash_backward, save


@dataclass(frozen=True)
class _Rectangle:
    """Where one rectangle stands in the op's tensors."""

    samples: int
    queries: slice
    keys: slice
    pairs: slice
    causal: bool
    """It holds no image keys."""

    def heads(self, x: Tensor, rows: slice) -> Tensor:
        """(samples, heads, rows of one, K) of queries or keys, in place."""
        return x[rows].unflatten(0, (self.samples, -1)).transpose(1, 2)

    def row_sums(self, lse: Tensor) -> Tensor:
        """(samples, H, queries) of the flat log-sum-exps, in place."""
        return lse[self.queries].view(self.samples, lse.shape[1], -1)

    def options(self, mask: Tensor, scale: float) -> dict[str, Any]:
        """How torch's kernel is told what is seen."""
        added = None if self.causal else mask[self.pairs].view(self.samples, 1, -1, self._width)
        return {"dropout_p": 0.0, "is_causal": self.causal, "attn_mask": added, "scale": scale}

    @property
    def _width(self) -> int:
        return (self.keys.stop - self.keys.start) // self.samples


def _rectangles(shape: Sequence[int]) -> Iterator[_Rectangle]:
    """Those that hold a query."""
    query = key = pair = 0
    for samples, queries, keys in zip(shape[::3], shape[1::3], shape[2::3], strict=True):
        causal = keys == queries
        pairs = 0 if causal else samples * queries * keys
        last = (query + samples * queries, key + samples * keys, pair + pairs)
        if queries:
            yield _Rectangle(samples, slice(query, last[0]), slice(key, last[1]), slice(pair, last[2]), causal)
        query, key, pair = last


@torch.library.custom_op("hive_ds::rectangle_attention", mutates_args=())
def rectangle_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, shape: Sequence[int], scale: float, pairs: int
) -> tuple[Tensor, Tensor]:
    """Attention of (R, H, K) queries to (S, G, K) keys and values; returns (R, H, K) and log-sum-exps (R, H).

    A rectangle with as many keys as queries holds text alone: query t of a sample sees keys 0 to t. The order of the
    log-sum-exps is the op's own affair.

    Args:
        q: queries of all rectangles end to end, sample by sample; H a multiple of G; contiguous.
        k: keys, likewise.
        v: values, likewise.
        mask: added to the scores, 1-D in q's dtype: (samples, queries, keys) of all other rectangles end to end, 0
            where a query sees a key, else -inf; no query sees nothing.
        shape: samples, queries and keys of each rectangle.
        scale: factor on the scores.
        pairs: visible (query, key) pairs of one head, for the FLOP count; padding is not visible.
    """
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for part in _rectangles(shape):
        queries, keys, values = part.heads(q, part.queries), part.heads(k, part.keys), part.heads(v, part.keys)
        found, sums = flash(queries, keys, values, **part.options(mask, scale))
        part.heads(out, part.queries).copy_(found)
        part.row_sums(lse).copy_(sums)
    return out, lse


@torch.library.custom_op("hive_ds::rectangle_attention_backward", mutates_args=())
def _gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    shape: Sequence[int],
    scale: float,
    pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for part in _rectangles(shape):
        given, queries, found = (part.heads(x, part.queries) for x in (dout, q, out))
        keys, values = (part.heads(x, part.keys) for x in (k, v))
        parts = flash_backward(given, queries, keys, values, found, part.row_sums(lse), **part.options(mask, scale))
        for whole, rows, gradient in zip(gradients, (part.queries, part.keys, part.keys), parts, strict=True):
            part.heads(whole, rows).copy_(gradient)
    return gradients


@rectangle_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@_gradient.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    # The log-sum-exps leave this file nowhere: dlse is zero.
    return (*_gradient(dout.contiguous(), *ctx.saved_tensors, *ctx.numbers), None, None, None, None)


rectangle_attention.register_autograd(_differentiate, setup_context=save)
attend = differentiable(rectangle_attention, save, _differentiate)
"""The op, as calls outside of torch.library's own machinery take it."""

count_flops(torch.ops.hive_ds.rectangle_attention, torch.ops.hive_ds.rectangle_attention_backward)
