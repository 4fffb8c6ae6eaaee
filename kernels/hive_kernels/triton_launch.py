"""Launching the Triton kernels: buffers, tiles and grids of one forward or backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from .arguments import KernelArguments
from .tiles import INTERPRETED, Tile
from .triton_backward import (
    delta_kernel,
    hierarchical_attention_key_gradient_kernel,
    hierarchical_attention_query_gradient_kernel,
)
from .triton_common import LOG2E
from .triton_forward import finish_kernel, hierarchical_attention_forward_kernel
from .triton_short import hierarchical_attention_short_gradient_kernel

NORMS = {"none": 0, "pre_rope": 1, "post_rope": 2}


def forward(a: KernelArguments) -> tuple[Tensor, Tensor]:
    """Attention output and lse."""
    q, k, v, image_k, image_v = (_rows_in_one_piece(x) for x in (a.q, a.k, a.v, a.image_k, a.image_v))
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:2], dtype=torch.float32)
    if not a.fused and not a.decoding:
        k, image_k = _finished(a, k, a.cos, a.sin), _finished(a, image_k, a.image_cos, a.image_sin)
    cache = k.ndim == 4
    work = a.row_work
    if len(work):
        with _device_of(q):
            hierarchical_attention_forward_kernel[(len(work) * a.groups,)](
                q, k, v, image_k, image_v, out, lse, *_tables(a), _or(a.q_weight, q), _or(a.k_weight, q),
                work, a.samples, a.seen, a.scale * LOG2E.value, a.eps,
                k.stride(0) if cache else 0, v.stride(0) if cache else 0,
                *_strides(q, k, v, image_k, image_v), **_shape(a), **_blocks(a.forward_tile),
                FINISH_KEYS=a.fused, CACHE=cache,
            )  # fmt: skip
    return out, lse


def backward(a: KernelArguments, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor) -> list[Tensor]:
    """Gradients of q, k, v, image_k, image_v and the two norm weights, these in fp32 and empty without norm."""
    dout, dlse = dout.contiguous(), dlse.contiguous()
    inputs = [_rows_in_one_piece(x) for x in (a.q, a.k, a.v, a.image_k, a.image_v)]
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    passes = _short_pass if a.one_pass else _two_passes
    with _device_of(a.q):
        q_partials, k_partials = passes(a, inputs, out, lse, dout, dlse, gradients)
    # One row a program, added up in the order of the rows: the same in every run.
    return [*gradients, q_partials.sum(0), k_partials.sum(0)]


def _short_pass(
    a: KernelArguments,
    inputs: list[Tensor],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    gradients: list[Tensor],
) -> tuple[Tensor, Tensor]:
    q, k, v, image_k, image_v = inputs
    work = a.backward_work
    q_partials, k_partials = (_partials(a, len(work)) for _ in "qk")
    tile = a.tile("backward short")
    tile = tile._replace(rows=min(tile.rows, max(64, triton.next_power_of_2(a.max_rows))))
    if len(work):
        hierarchical_attention_short_gradient_kernel[(len(work) * a.groups,)](
            q, k, v, image_k, image_v, out, dout, lse, dlse, *gradients, q_partials, k_partials, *_tables(a),
            _or(a.q_weight, q), _or(a.k_weight, q), work, a.samples, a.seen, a.scale * LOG2E.value, a.eps,
            *_strides(*inputs), **_shape(a), **_blocks(tile),
        )  # fmt: skip
    return q_partials, k_partials


def _two_passes(
    a: KernelArguments,
    inputs: list[Tensor],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    gradients: list[Tensor],
) -> tuple[Tensor, Tensor]:
    q, k, v, image_k, image_v = inputs
    dq, dk, dv, dimage_k, dimage_v = gradients
    cos, sin, image_cos, image_sin = _tables(a)
    q_partials, k_partials = _partials(a, len(a.backward_work)), _partials(a, len(a.key_work))
    common = (a.scale * LOG2E.value, a.eps)
    delta = torch.empty_like(lse)
    if lse.numel():
        rows = 64
        delta_kernel[(triton.cdiv(lse.numel(), rows),)](
            out, dout, dlse, delta, lse.numel(), HEAD_DIM=q.shape[-1], BLOCK_K=_block_k(q.shape[-1]), BLOCK_M=rows
        )
    if len(a.key_work):
        hierarchical_attention_key_gradient_kernel[(len(a.key_work) * a.groups,)](
            _finished(a, q, a.cos, a.sin, of_queries=True).contiguous(), k, v, image_k, image_v, dout, lse, delta,
            dk, dv, dimage_k, dimage_v, k_partials, cos, sin, image_cos, image_sin, _or(a.k_weight, q),
            a.key_work, a.samples, a.seen, a.first_token, *common, *_strides(k, v, image_k, image_v),
            **_shape(a), **_blocks(a.tile("keys")),
        )  # fmt: skip
    if len(a.backward_work):
        hierarchical_attention_query_gradient_kernel[(len(a.backward_work) * a.groups,)](
            q, _finished(a, k, a.cos, a.sin).contiguous(), v,
            _finished(a, image_k, a.image_cos, a.image_sin).contiguous(), image_v, dout, lse, delta, dq, q_partials,
            cos, sin, _or(a.q_weight, q), a.backward_work, a.samples, a.seen, *common, *_strides(q, v, image_v),
            **_shape(a), **_blocks(a.tile("queries")),
        )  # fmt: skip
    return q_partials, k_partials


def _finished(
    a: KernelArguments, x: Tensor, cos: Tensor | None, sin: Tensor | None, *, of_queries: bool = False
) -> Tensor:
    """x normed and rotated, or x itself if there is nothing to do."""
    if (a.qk_norm == "none" and cos is None) or x.numel() == 0:
        return x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count, rows = x.shape[0] * x.shape[1], 32
    half = x.shape[-1] // 2
    weight = a.q_weight if of_queries else a.k_weight
    with _device_of(x):
        finish_kernel[(triton.cdiv(count, rows),)](
            x, y, _or(cos, x), _or(sin, x), _or(weight, x), count, a.eps, *_strides(x),
            HEADS=x.shape[1], HALF=half, BLOCK_H=_block_h(half), BLOCK_M=rows,
            NORM=NORMS[a.qk_norm], ROTATE=cos is not None,
        )  # fmt: skip
    return y


def _rows_in_one_piece(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Stride of a token and of a head of each tensor; of a padded cache, of its rows laid end to end.

    What a dimension of size 1 has for a stride means nothing, and must not make Triton compile anew.
    """
    strides = []
    for x in tensors:
        heads, head_dim = x.shape[-2:]
        head = x.stride(-2) if heads > 1 else head_dim
        strides += [x.stride(-3) if x.shape[-3] > 1 else heads * head_dim, head]
    return strides


def _tables(a: KernelArguments) -> Sequence[Tensor]:
    """Without images the text's tables stand in for theirs: both branches of a kernel must have them in one dtype."""
    cos, sin = _or(a.cos, a.q), _or(a.sin, a.q)
    return [cos, sin, _or(a.image_cos, cos), _or(a.image_sin, sin)]


def _or(x: Tensor | None, never_read: Tensor) -> Tensor:
    return never_read if x is None else x


def _partials(a: KernelArguments, pieces: int) -> Tensor:
    """Shares of a norm weight's gradient, one row a program; without norm no column."""
    columns = 0 if a.qk_norm == "none" else a.q.shape[-1]
    return torch.empty(pieces * a.groups, columns, dtype=torch.float32, device=a.q.device)


def _shape(a: KernelArguments) -> dict[str, int | bool]:
    head_dim = a.q.shape[-1]
    return {
        "HEADS": a.q.shape[1],
        "GROUPS": a.groups,
        "HALF": head_dim // 2,
        "BLOCK_H": _block_h(head_dim // 2),
        "BLOCK_K": _block_k(head_dim),
        "NORM": NORMS[a.qk_norm],
        "ROTATE": a.cos is not None,
    }


def _blocks(tile: Tile) -> dict[str, int]:
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    return blocks if INTERPRETED else {**blocks, "num_warps": tile.warps, "num_stages": tile.stages}


def _block_h(half: int) -> int:
    return max(16, triton.next_power_of_2(half))


def _block_k(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
