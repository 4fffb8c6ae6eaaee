"""Backward kernel of short text: one program owns all rows of a (sample, group) and goes over its keys once.

dQ stays in registers, and the five matrix products of a tile are all there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    LN2,
    LOG2E,
    dot,
    load_finished,
    load_rows,
    load_weight,
    read_sample,
    store_halves,
    store_rows,
    store_weight_gradient,
    through_finish,
)


@triton.jit
def visit_source(
    dq_low, dq_high, dw_low, dw_high, q_low, q_high, dout, lse, delta, k, v, dk, dv, cos, sin, w_low, w_high, limit,
    first, last, scale, eps, stride_k, stride_v, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys ``first`` to ``last`` of one source: write their gradients, add to those of the rows and of the weight."""
    columns = tl.arange(0, BLOCK_K)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_ok = key < last
        k_low, k_high = load_finished(
            k, key * stride_k, cos, sin, key, key_ok, w_low, w_high, eps, HALF, BLOCK_H, NORM, ROTATE, MASKED
        )
        values = load_rows(v + key[:, None] * stride_v + columns[None, :], key_ok, columns, 2 * HALF, MASKED)
        scores = dot(q_high, tl.trans(k_high), dot(q_low, tl.trans(k_low)))
        weights = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            weights = tl.where(key[None, :] < limit[:, None], weights, 0.0)
        d_values = dot(tl.trans(weights.to(dout.dtype)), dout)
        d_scores = (weights * (dot(dout, tl.trans(values)) - delta[:, None])).to(k_low.dtype)
        dq_low = dot(d_scores, k_low, dq_low)
        dq_high = dot(d_scores, k_high, dq_high)
        d_scores = tl.trans(d_scores)
        dk_low, dk_high, own_low, own_high = through_finish(
            dot(d_scores, q_low) * (scale * LN2), dot(d_scores, q_high) * (scale * LN2), k, key * stride_k, cos, sin,
            key, key_ok, w_low, w_high, eps, HALF, BLOCK_H, NORM, ROTATE, MASKED,
        )  # fmt: skip
        dw_low += own_low
        dw_high += own_high
        store_halves(dk, key * (GROUPS * 2 * HALF), key_ok, dk_low, dk_high, HALF)
        store_rows(dv, key * (GROUPS * 2 * HALF), key_ok, d_values, 2 * HALF)
    return dq_low, dq_high, dw_low, dw_high


@triton.jit
def clear_rows(x, first, last, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STRIDE: tl.constexpr):
    """Write zeros to rows ``first`` to ``last``."""
    columns = tl.arange(0, BLOCK_K)
    zero = tl.zeros([BLOCK_N, BLOCK_K], x.dtype.element_ty)
    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        mask = (row < last)[:, None] & (columns < WIDTH)[None, :]
        tl.store(x + row[:, None] * STRIDE + columns[None, :], zero, mask=mask)


@triton.jit
def visit_images(
    dq_low, dq_high, dw_low, dw_high, q_low, q_high, dout, lse, delta, k, v, dk, dv, cos, sin, w_low, w_high, seen,
    token, row_ok, tokens, patches, scale, eps, stride_k, stride_v, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """`visit_source` for image keys: those that all rows see, those that some see, and zeros for the rest."""
    limit = tl.load(seen + token, mask=row_ok, other=0)
    end = tl.max(limit, 0)
    full = 0
    if tokens > 0:
        full = tl.load(seen) // BLOCK_N * BLOCK_N
    dq_low, dq_high, dw_low, dw_high = visit_source(
        dq_low, dq_high, dw_low, dw_high, q_low, q_high, dout, lse, delta, k, v, dk, dv, cos, sin, w_low, w_high,
        limit, 0, full, scale, eps, stride_k, stride_v,
        HALF, BLOCK_H, BLOCK_K, BLOCK_N, GROUPS, NORM, ROTATE, False,
    )  # fmt: skip
    dq_low, dq_high, dw_low, dw_high = visit_source(
        dq_low, dq_high, dw_low, dw_high, q_low, q_high, dout, lse, delta, k, v, dk, dv, cos, sin, w_low, w_high,
        limit, full, end, scale, eps, stride_k, stride_v,
        HALF, BLOCK_H, BLOCK_K, BLOCK_N, GROUPS, NORM, ROTATE, True,
    )  # fmt: skip
    clear_rows(dk, end, patches, 2 * HALF, BLOCK_K, BLOCK_N, GROUPS * 2 * HALF)
    clear_rows(dv, end, patches, 2 * HALF, BLOCK_K, BLOCK_N, GROUPS * 2 * HALF)
    return dq_low, dq_high, dw_low, dw_high


@triton.jit
def rows_of_gradient(
    out, dout, lse, dlse, first, place, row_ok, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, DLSE: tl.constexpr
):
    """Of each row: dout, lse as a power of two (infinity for padding), sum of out * dout minus the gradient of lse."""
    columns = tl.arange(0, BLOCK_K)
    offsets = place[:, None] * WIDTH + columns[None, :]
    dout_tile = load_rows(dout + first * WIDTH + offsets, row_ok, columns, WIDTH, True)
    out_tile = load_rows(out + first * WIDTH + offsets, row_ok, columns, WIDTH, True)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse + first + place, mask=row_ok, other=0.0)
    return dout_tile, tl.load(lse + first + place, mask=row_ok, other=float("inf")) * LOG2E, delta


@triton.jit(do_not_specialize=["work", "samples", "seen"])
def hierarchical_attention_short_gradient_kernel(
    q, k, v, image_k, image_v, out, dout, lse, dlse, dq, dk, dv, dimage_k, dimage_v, q_partials, k_partials,
    cos, sin, image_cos, image_sin, q_weight, k_weight, work, samples, seen, scale, eps,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_it, stride_ih, stride_jt, stride_jh,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """One program: one (sample, group), of at most BLOCK_M rows. ``work`` (programs / groups, 2) lists the samples.

    Without ``DLSE`` nothing depends on lse, and dlse is not read.
    """
    program = tl.program_id(0)
    group = program % GROUPS
    PACK: tl.constexpr = HEADS // GROUPS
    sample = tl.load(work + program // GROUPS * 2)
    first_query, tokens, first_text, _, first_image, patches = read_sample(samples, sample)
    row = tl.arange(0, BLOCK_M)
    row_ok = row < tokens * PACK
    token = row // PACK
    head = group * PACK + row % PACK
    q += first_query * stride_qt
    cos += first_query * HALF
    sin += first_query * HALF
    offsets = token * stride_qt + head * stride_qh
    w_low, w_high = load_weight(q_weight, HALF, BLOCK_H, NORM)
    q_low, q_high = load_finished(
        q, offsets, cos, sin, token, row_ok, w_low, w_high, eps, HALF, BLOCK_H, NORM, ROTATE, True
    )
    place = token * HEADS + head
    dout_tile, lse_row, delta = rows_of_gradient(
        out, dout, lse, dlse, first_query * HEADS, place, row_ok, 2 * HALF, BLOCK_K, DLSE
    )

    dq_low = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    dq_high = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    dw_low = tl.zeros([BLOCK_H], tl.float32)
    dw_high = tl.zeros([BLOCK_H], tl.float32)
    w_low, w_high = load_weight(k_weight, HALF, BLOCK_H, NORM)
    stride: tl.constexpr = GROUPS * 2 * HALF
    text = first_text * stride + group * (2 * HALF)
    dq_low, dq_high, dw_low, dw_high = visit_source(
        dq_low, dq_high, dw_low, dw_high, q_low, q_high, dout_tile, lse_row, delta,
        k + first_text * stride_kt + group * stride_kh, v + first_text * stride_vt + group * stride_vh,
        dk + text, dv + text, cos, sin, w_low, w_high, token + 1, 0, tokens, scale, eps, stride_kt, stride_vt,
        HALF, BLOCK_H, BLOCK_K, BLOCK_N, GROUPS, NORM, ROTATE, True,
    )  # fmt: skip
    dq_low, dq_high, dw_low, dw_high = visit_images(
        dq_low, dq_high, dw_low, dw_high, q_low, q_high, dout_tile, lse_row, delta,
        image_k + first_image * stride_it + group * stride_ih, image_v + first_image * stride_jt + group * stride_jh,
        dimage_k + first_image * stride + group * (2 * HALF), dimage_v + first_image * stride + group * (2 * HALF),
        image_cos + first_image * HALF, image_sin + first_image * HALF, w_low, w_high, seen + first_query, token,
        row_ok, tokens, patches, scale, eps, stride_it, stride_jt,
        HALF, BLOCK_H, BLOCK_K, BLOCK_N, GROUPS, NORM, ROTATE,
    )  # fmt: skip
    if NORM:
        store_weight_gradient(k_partials, program, dw_low, dw_high, HALF)

    w_low, w_high = load_weight(q_weight, HALF, BLOCK_H, NORM)
    dq_low, dq_high, dw_low, dw_high = through_finish(
        dq_low * (scale * LN2), dq_high * (scale * LN2), q, offsets, cos, sin, token, row_ok, w_low, w_high, eps,
        HALF, BLOCK_H, NORM, ROTATE, True,
    )  # fmt: skip
    store_halves(dq + first_query * (HEADS * 2 * HALF), place * (2 * HALF), row_ok, dq_low, dq_high, HALF)
    if NORM:
        store_weight_gradient(q_partials, program, dw_low, dw_high, HALF)
