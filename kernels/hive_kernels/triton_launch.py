"""Launching the Triton kernels: buffers, tiles and grids of one forward or backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from torch import Tensor

from . import triton_backward, triton_finish, triton_forward, triton_short
from .arguments import KernelArguments
from .copies import rows_in_memory
from .launching import Launcher, Settings
from .tiles import INTERPRETED, Tile
from .triton_common import LOG2E, NORM_NONE, NORM_POST_ROPE, NORM_PRE_ROPE

FINISHED_ROWS = 32
"""Rows of a program of the kernel that goes over rows one by one."""
NORMS = {"none": NORM_NONE.value, "pre_rope": NORM_PRE_ROPE.value, "post_rope": NORM_POST_ROPE.value}

forward_kernel = Launcher(triton_forward.hierarchical_attention_forward_kernel)
finish_kernel = Launcher(triton_finish.finish_kernel)
key_gradient_kernel = Launcher(triton_backward.hierarchical_attention_key_gradient_kernel)
query_gradient_kernel = Launcher(triton_backward.hierarchical_attention_query_gradient_kernel)
short_gradient_kernel = Launcher(triton_short.hierarchical_attention_short_gradient_kernel)


def forward(a: KernelArguments) -> tuple[Tensor, Tensor]:
    """Attention output and lse."""
    q, k, v, image_k, image_v = (rows_in_memory(x) for x in (a.q, a.k, a.v, a.image_k, a.image_v))
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    work, cache = a.row_work, k.ndim == 4
    with _device_of(q):
        if not a.fused() and not a.decoding:
            _, k, image_k = _finished(a, q, k, image_k)
        if len(work):
            weights = _or(a.q_weight, q), _or(a.k_weight, q)
            forward_kernel(
                len(work) * a.groups(),
                (q, k, v, image_k, image_v, out, lse, *_tables(a), *weights, work, a.samples, a.seen),
                (
                    *(a.scale * LOG2E.value, a.eps, k.stride(0) if cache else 0, v.stride(0) if cache else 0),
                    *_strides(q, k, v, image_k, image_v),
                ),
                attention_settings(*_shape(a), a.forward_tile(), FINISH_KEYS=a.fused(), CACHE=cache),
            )
    return out, lse


def backward(a: KernelArguments, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> list[Tensor]:
    """Gradients of q, k, v, image_k, image_v and the two norm weights, these in fp32 and empty without norm.

    ``dlse`` is None where nothing depends on lse.
    """
    dout, dlse = dout.contiguous(), None if dlse is None else dlse.contiguous()
    inputs = [rows_in_memory(x) for x in (a.q, a.k, a.v, a.image_k, a.image_v)]
    gradients = [x.new_empty(x.shape) for x in inputs]
    passes = _short_pass if a.one_pass() else _two_passes
    with _device_of(a.q):
        partials = passes(a, inputs, out, lse, dout, dlse, gradients)
    # One row a program, added up in the order of the rows: the same in every run.
    return [*gradients, *(x if a.qk_norm == "none" else x.sum(0) for x in partials)]


def _short_pass(
    a: KernelArguments,
    inputs: list[Tensor],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: list[Tensor],
) -> tuple[Tensor, Tensor]:
    q, work = a.q, a.backward_work
    q_partials, k_partials = (_partials(a, len(work)) for _ in "qk")
    tile = a.tile("backward short")
    tile = tile._replace(rows=min(tile.rows, max(64, triton.next_power_of_2(a.max_rows))))
    if len(work):
        weights = _or(a.q_weight, q), _or(a.k_weight, q)
        short_gradient_kernel(
            len(work) * a.groups(),
            (
                *(*inputs, out, dout, lse, _or(dlse, lse), *gradients, q_partials, k_partials, *_tables(a), *weights),
                *(work, a.samples, a.seen),
            ),
            (a.scale * LOG2E.value, a.eps, *_strides(*inputs)),
            attention_settings(*_shape(a), tile, DLSE=dlse is not None),
        )
    return q_partials, k_partials


def _two_passes(
    a: KernelArguments,
    inputs: list[Tensor],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: list[Tensor],
) -> tuple[Tensor, Tensor]:
    q, k, v, image_k, image_v = inputs
    dq, dk, dv, dimage_k, dimage_v = gradients
    cos, sin, image_cos, image_sin = _tables(a)
    q_partials, k_partials = _partials(a, len(a.backward_work)), _partials(a, len(a.key_work))
    common, shape = (a.scale * LOG2E.value, a.eps), _shape(a)
    delta = torch.empty_like(lse)
    given = (out, dout, _or(dlse, lse), delta)
    finished_q, finished_k, finished_image_k = _finished(a, q, k, image_k, given, depends_on_lse=dlse is not None)
    if len(a.key_work):
        key_gradient_kernel(
            len(a.key_work) * a.groups(),
            (
                *(finished_q, k, v, image_k, image_v, dout, lse, delta, dk, dv, dimage_k, dimage_v, k_partials),
                *(cos, sin, image_cos, image_sin, _or(a.k_weight, q), a.key_work, a.samples, a.seen, a.first_token),
            ),
            (*common, *_strides(k, v, image_k, image_v)),
            attention_settings(*shape, a.tile("keys")),
        )
    if len(a.backward_work):
        query_gradient_kernel(
            len(a.backward_work) * a.groups(),
            (
                *(q, finished_k, v, finished_image_k, image_v, dout, lse, delta, dq, q_partials, cos, sin),
                *(_or(a.q_weight, q), a.backward_work, a.samples, a.seen),
            ),
            (*common, *_strides(q, v, image_v)),
            attention_settings(*shape, a.tile("queries")),
        )
    return q_partials, k_partials


def _finished(
    a: KernelArguments,
    q: Tensor,
    k: Tensor,
    image_k: Tensor,
    backward: tuple[Tensor, ...] = (),
    *,
    depends_on_lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, text keys and image keys, keys normed and rotated where there is such a thing to do.

    ``backward`` is out, dout, dlse and delta of a backward pass, which fills in delta and has queries finished too.
    """
    settings = _finish_settings(*_shape(a), bool(backward), depends_on_lse)
    finishes = settings.values["NORM"] != 0 or settings.values["ROTATE"]
    rows = [x.shape[0] * x.shape[1] for x in (q, k, image_k)]
    programs = [-(-count // FINISHED_ROWS) for count in rows]
    if not backward:
        programs[0] = 0
    if not finishes:
        programs[1:] = [0, 0]
    # What is not finished is read as it is, by kernels that take it for contiguous in a backward pass.
    q_out, k_out, image_out = (
        x.new_empty(x.shape) if finishes and count else (x.contiguous() if backward else x)
        for x, count in zip((q, k, image_k), programs, strict=True)
    )
    if sum(programs):
        finish_kernel(
            sum(programs),
            (
                *(q, k, image_k, q_out, k_out, image_out, *(backward or (q, q, a.samples, a.samples)), *_tables(a)),
                *(_or(a.q_weight, q), _or(a.k_weight, q)),
            ),
            (*rows, a.eps, *_strides(q, k, image_k)),
            settings,
        )
    return q_out, k_out, image_out


def _strides(*tensors: Tensor) -> list[int]:
    """Stride of a token and of a head of each tensor; of a padded cache, of its rows laid end to end.

    What a dimension of size 1 has for a stride means nothing, and must not make Triton compile anew.
    """
    strides = []
    for x in tensors:
        *_, tokens, heads, head_dim = x.shape
        *_, token, head, _ = x.stride()
        strides += [token if tokens > 1 else heads * head_dim, head if heads > 1 else head_dim]
    return strides


def _tables(a: KernelArguments) -> Sequence[Tensor]:
    """Without images the text's tables stand in for theirs: both branches of a kernel must have them in one dtype."""
    cos, sin = _or(a.cos, a.q), _or(a.sin, a.q)
    return [cos, sin, _or(a.image_cos, cos), _or(a.image_sin, sin)]


def _or(x: Tensor | None, never_read: Tensor) -> Tensor:
    return never_read if x is None else x


def _partials(a: KernelArguments, pieces: int) -> Tensor:
    """Shares of a norm weight's gradient, one row a program; without norm nothing."""
    shape = (0,) if a.qk_norm == "none" else (pieces * a.groups(), a.q.shape[-1])
    return a.q.new_empty(shape, dtype=torch.float32)


def _shape(a: KernelArguments) -> tuple[int, int, int, str, bool]:
    _, heads, head_dim = a.q.shape
    return heads, a.groups(), head_dim, a.qk_norm, a.cos is not None


@cache
def attention_settings(
    heads: int,
    groups: int,
    head_dim: int,
    qk_norm: str,
    rotate: bool,
    tile: Tile,
    **own: bool,
) -> Settings:
    """Constants and compiler options of an attention kernel; ``own`` are constants that it alone has."""
    block_k = max(16, triton.next_power_of_2(head_dim))
    values = {"HEADS": heads, "GROUPS": groups, **_halves(head_dim), "BLOCK_K": block_k}
    values |= {"NORM": NORMS[qk_norm], "ROTATE": rotate, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    options = {} if INTERPRETED else {"num_warps": tile.warps, "num_stages": tile.stages}
    return Settings(**values, **own, **options)


@cache
def _finish_settings(
    heads: int, groups: int, head_dim: int, qk_norm: str, rotate: bool, backward: bool, dlse: bool
) -> Settings:
    shape = {"HEADS": heads, "GROUPS": groups, **_halves(head_dim), "BLOCK_M": FINISHED_ROWS}
    return Settings(**shape, NORM=NORMS[qk_norm], ROTATE=rotate, BACKWARD=backward, DLSE=dlse)


def _halves(head_dim: int) -> dict[str, int]:
    return {"HALF": head_dim // 2, "BLOCK_H": max(16, triton.next_power_of_2(head_dim // 2))}


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()
