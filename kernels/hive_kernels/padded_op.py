"""Attention over padded rectangles on CPUs as an op of torch.library, so that its FLOPs are those of visible pairs.

Inside is torch's own flash kernel for CPUs. Called through `scaled_dot_product_attention` it would be counted by the
size of its rectangle, padding and hidden keys included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .copies import rows_in_memory
from .library import count_flops

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.library.custom_op("hive_ds::padded_attention", mutates_args=())
def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, pairs: int
) -> tuple[Tensor, Tensor]:
    """Attention on CPUs over (B, H, T, K) queries and (B, G, S, K) keys and values, and its log-sum-exp (B, H, T).

    Args:
        q: queries, H a multiple of G; the K values of a row lie side by side in memory: torch's kernel reads no other
            stride and does not say.
        k: keys, likewise.
        v: values, likewise.
        mask: added to the scores, (B, 1, T, S) in q's dtype: 0 where a query sees a key, else -inf; no row all -inf.
            None: everything, or as ``causal`` says.
        causal: query t sees keys 0 to t.
        scale: factor on the scores.
        pairs: visible (query, key) pairs of one head, for the FLOP count; padding is not visible.
    """
    out, lse = flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse


@torch.library.custom_op("hive_ds::padded_attention_backward", mutates_args=())
def _gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)


@padded_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, pairs: int
) -> tuple[Tensor, Tensor]:
    out, lse = flash(q, k, v)
    return out, lse


@_gradient.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Any:
    return flash_backward(dout, q, k, v, out, lse, 0.0, False)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep for backward what an op of q, k, v, a mask and numbers was given, and what it returned."""
    q, k, v, mask, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, mask)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    # No caller passes the log-sum-exp on where gradients are wanted: dlse is zero.
    return (*_gradient(rows_in_memory(dout), *ctx.saved_tensors, *ctx.numbers), None, None, None, None)


padded_attention.register_autograd(_differentiate, setup_context=save)


count_flops(torch.ops.hive_ds.padded_attention, torch.ops.hive_ds.padded_attention_backward)
