"""Norm over the head dim and rotary embedding: what queries and keys go through before they meet."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from .checks import check_dtype, check_number, check_qk_norm, check_tables, check_weight


def finish_keys(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    qk_norm: str = "none",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Norm and rotate projected keys (or queries): what a key/value cache stores.

    Args:
        x: (T, G, K), bf16, fp16, fp32 or fp64.
        weight: (K,) RMSNorm weight; None exactly where ``qk_norm`` is "none".
        eps: added to the mean square.
        qk_norm: "none", "pre_rope" (norm, then rotate) or "post_rope" (rotate, then norm).
        cos: (T, K) as Hugging Face builds it (each of K/2 frequencies twice), or its first half (T, K/2) in fp32 or
            fp64. None: already rotated, which "pre_rope" cannot do with.
        sin: like ``cos``.

    Returns:
        (T, G, K) in the dtype of ``x``. Computed in fp32 (fp64 for fp64) and cast once.

    Raises:
        ValueError: wrong shapes, dtypes or devices, a weight too many or missing, "pre_rope" without tables.
    """
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (T, G, K)")
    check_dtype("x", x)
    check_number("eps", eps, low=0)
    check_qk_norm(qk_norm, cos)
    check_weight("weight", weight, x, qk_norm)
    check_tables("", cos, sin, x.shape[0], x)
    return finish(x, weight, eps, qk_norm, cos, sin)


def finish(
    x_THK: Tensor, weight: Tensor | None, eps: float, qk_norm: str, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """`finish_keys` on checked arguments."""
    if qk_norm == "none" and cos is None:
        return x_THK
    y_THK = x_THK.to(torch.promote_types(x_THK.dtype, torch.float32))
    if qk_norm == "pre_rope":
        y_THK = _norm(y_THK, weight, eps)
    if cos is not None and sin is not None:
        y_THK = _rotate(y_THK, cos, sin)
    if qk_norm == "post_rope":
        y_THK = _norm(y_THK, weight, eps)
    return y_THK.to(x_THK.dtype)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)


def _rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + cat(-x[K/2:], x[:K/2]) * sin; the tables hold each frequency twice.

    Over whole rows, with the sign in the table: half as long on a CPU as half by half.
    """
    half = x_THK.shape[-1] // 2
    cos, sin = (table[:, None, :half].to(x_THK.dtype) for table in (cos, sin))
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return torch.addcmul(x_THK * cos, x_THK.roll(half, dims=-1), sin)
