"""torch's attention of variable length on CPUs, where it has no kernel: its own op, with plain arithmetic inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax of one text's causal scores, fp32 (H, T, T)."""
    scores = torch.einsum("thk,shk->hts", q, k).float() * scale
    return scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(-1)


def texts_of(bounds: Tensor, q: Tensor, *others: Tensor, heads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Text by text: q and ``others``, then ``heads`` with each key/value head once a query head."""
    lengths = bounds.diff().tolist()
    wide = [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in heads]
    return (list(one) for one in zip(*(x.split(lengths) for x in (q, *others, *wide)), strict=True))


@cache
def serve_on_cpu() -> None:
    """Give torch's own op, whose autograd and shapes stay as they are, what it lacks on CPUs; skip without it."""
    pytest.importorskip("torch", minversion="2.11", reason="needs torch 2.11 or later: `torch_flash` is its own")
    from torch.nn.attention import varlen

    @varlen._varlen_attn.register_kernel("cpu")
    def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int,
          is_causal: bool = False, scale: float | None = None, window_size: Any = None, *more: Any) -> Any:  # fmt: skip
        assert is_causal
        assert scale is not None
        assert bounds.dtype == bounds_k.dtype == torch.int32
        assert longest == longest_k == int(bounds.diff().max())
        outs = [
            torch.einsum("hts,shk->thk", weights(queries, keys, scale).to(q.dtype), values)
            for queries, keys, values in texts_of(bounds, q, heads=(k, v))
        ]
        return torch.cat(outs), q.new_zeros(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, bounds_k: Tensor,
          longest: int, longest_k: int, is_causal: bool, state: Tensor, scale: float | None = None,
          window_size: Any = None, *more: Any) -> Any:  # fmt: skip
        assert scale is not None
        found: list[list[Tensor]] = [[], [], []]
        for queries, outs, grads, keys, values in texts_of(bounds, q, out, grad, heads=(k, v)):
            p = weights(queries, keys, scale)
            d_p = torch.einsum("thk,shk->hts", grads, values).float()
            d_scores = p * (d_p - (grads * outs).sum(-1).T[:, :, None].float()) * scale
            found[0].append(torch.einsum("hts,shk->thk", d_scores.to(q.dtype), keys))
            for place, (left, right) in enumerate(((d_scores, queries), (p, grads)), start=1):
                each = torch.einsum("hts,thk->shk", left.to(q.dtype), right)
                found[place].append(each.unflatten(1, (k.shape[1], -1)).sum(2))
        return tuple(map(torch.cat, found))
