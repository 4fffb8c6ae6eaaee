"""The Triton backend behind the public call: what it takes, and a call of the registered op."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .arguments import KernelArguments
from .layout import AttentionLayout
from .registered import attention_op
from .tiles import INTERPRETED

MAX_HEAD_DIM = 256
INSTALLED = importlib.util.find_spec("triton") is not None
"""torch's wheels for CPUs come without Triton."""


def refusal(q: Tensor, layout: AttentionLayout, *, gradient: bool) -> str | None:
    """Why the Triton backend cannot serve a call; None if it can."""
    if q.dtype == torch.float64:
        return "q is torch.float64; expected torch.bfloat16, torch.float16 or torch.float32"
    head_dim = q.shape[-1]
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        return f"q has head dim {head_dim}; expected an even number of at most {MAX_HEAD_DIM}"
    if layout.decoding and gradient:
        return "q, k, v, image_k or image_v needs a gradient; expected none while decoding"
    if not INSTALLED:
        return "Triton is not installed; expected the package triton"
    if not q.is_cuda and not INTERPRETED:
        return f"q is on {q.device}; expected a GPU, or TRITON_INTERPRET=1 set before Python starts"
    return None


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    layout: AttentionLayout,
    softmax_scale: float,
    *,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
    qk_norm: str,
    cos: Tensor | None,
    sin: Tensor | None,
    image_cos: Tensor | None,
    image_sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Norm, rotation and attention: out and lse. Arguments are checked, and there is at least one query."""
    if image_k is None or image_v is None:
        image_k = image_v = k.new_empty(0, *k.shape[-2:])
    if layout.shares_images and not layout.decoding:
        rows, layout = layout.unshared
        image_k, image_v = image_k.index_select(0, rows), image_v.index_select(0, rows)
        if image_cos is not None and image_sin is not None:
            image_cos, image_sin = image_cos.index_select(0, rows), image_sin.index_select(0, rows)
    half = q.shape[-1] // 2
    cos, sin, image_cos, image_sin = (
        None if x is None else x[:, :half].float().contiguous() for x in (cos, sin, image_cos, image_sin)
    )
    pack = q.shape[1] // k.shape[-2]
    schedule = layout.schedule
    empty = schedule.samples[:0]
    arguments = KernelArguments(
        q, k, v, image_k, image_v, q_norm_weight, k_norm_weight, cos, sin, image_cos, image_sin,
        samples=schedule.samples, seen=schedule.seen, first_token=empty, row_work=empty, backward_work=empty,
        key_work=empty, scale=softmax_scale, eps=norm_eps, qk_norm=qk_norm, decoding=layout.decoding,
        max_rows=layout.max_queries * pack, pairs=schedule.pairs,
    )  # fmt: skip
    arguments = arguments._replace(row_work=schedule.row_work(pack, arguments.forward_tile.rows))
    if not layout.decoding and arguments.one_pass:
        arguments = arguments._replace(backward_work=schedule.sample_work())
    elif not layout.decoding:
        arguments = arguments._replace(
            first_token=schedule.first_token,
            backward_work=schedule.row_work(pack, arguments.tile("queries").rows),
            key_work=schedule.key_work(arguments.tile("keys").keys),
        )
    out, lse = attention_op(*arguments)
    return out, lse
