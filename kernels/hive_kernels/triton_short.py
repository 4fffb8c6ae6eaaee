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
    finish_gradient,
    finish_tile,
    load_halves,
    load_rows,
    load_tables,
    load_weight,
    store_halves,
    store_weight_gradient,
)
from .triton_forward import SAMPLE_COLUMNS


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
        k_low, k_high = load_halves(k, key * stride_k, key_ok, HALF, BLOCK_H, MASKED)
        cos_tile, sin_tile = load_tables(cos, sin, key, key_ok, HALF, BLOCK_H, ROTATE, MASKED)
        k_low, k_high = finish_tile(k_low, k_high, cos_tile, sin_tile, w_low, w_high, eps, HALF, NORM, ROTATE)
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
        # Read again instead of kept in registers through the products.
        k_low, k_high = load_halves(k, key * stride_k, key_ok, HALF, BLOCK_H, MASKED)
        cos_tile, sin_tile = load_tables(cos, sin, key, key_ok, HALF, BLOCK_H, ROTATE, MASKED)
        dk_low, dk_high, own_low, own_high = finish_gradient(
            dot(d_scores, q_low) * (scale * LN2), dot(d_scores, q_high) * (scale * LN2), k_low, k_high,
            cos_tile, sin_tile, w_low, w_high, eps, HALF, NORM, ROTATE,
        )  # fmt: skip
        dw_low += own_low
        dw_high += own_high
        store_halves(dk, key * (GROUPS * 2 * HALF), key_ok, dk_low, dk_high, HALF)
        tl.store(
            dv + key[:, None] * (GROUPS * 2 * HALF) + columns[None, :],
            d_values.to(dv.dtype.element_ty),
            mask=key_ok[:, None] & (columns < 2 * HALF)[None, :],
        )
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


@triton.jit(do_not_specialize=["work", "samples", "seen"])
def hierarchical_attention_short_gradient_kernel(
    q, k, v, image_k, image_v, out, dout, lse, dlse, dq, dk, dv, dimage_k, dimage_v, q_partials, k_partials,
    cos, sin, image_cos, image_sin, q_weight, k_weight, work, samples, seen, scale, eps,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_it, stride_ih, stride_jt, stride_jh,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One program: one (sample, group), of at most BLOCK_M rows. ``work`` (programs / groups, 2) lists the samples."""
    program = tl.program_id(0)
    group = program % GROUPS
    PACK: tl.constexpr = HEADS // GROUPS
    entry = samples + tl.load(work + program // GROUPS * 2) * SAMPLE_COLUMNS
    first_query = tl.load(entry).to(tl.int64)
    tokens = tl.load(entry + 1)
    first_text = tl.load(entry + 2).to(tl.int64)
    first_image = tl.load(entry + 4).to(tl.int64)
    patches = tl.load(entry + 5)

    row = tl.arange(0, BLOCK_M)
    row_ok = row < tokens * PACK
    token = row // PACK
    head = row % PACK
    q += first_query * stride_qt + group * PACK * stride_qh
    cos += first_query * HALF
    sin += first_query * HALF
    q_low, q_high = load_halves(q, token * stride_qt + head * stride_qh, row_ok, HALF, BLOCK_H, True)
    cos_tile, sin_tile = load_tables(cos, sin, token, row_ok, HALF, BLOCK_H, ROTATE, True)
    w_low, w_high = load_weight(q_weight, HALF, BLOCK_H, NORM)
    q_low, q_high = finish_tile(q_low, q_high, cos_tile, sin_tile, w_low, w_high, eps, HALF, NORM, ROTATE)
    columns = tl.arange(0, BLOCK_K)
    base = first_query * HEADS + group * PACK
    place = token * HEADS + head
    offsets = place[:, None] * (2 * HALF) + columns[None, :]
    dout_tile = load_rows(dout + base * (2 * HALF) + offsets, row_ok, columns, 2 * HALF, True)
    out_tile = load_rows(out + base * (2 * HALF) + offsets, row_ok, columns, 2 * HALF, True)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    delta -= tl.load(dlse + base + place, mask=row_ok, other=0.0)
    lse_row = tl.load(lse + base + place, mask=row_ok, other=float("inf")) * LOG2E

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
    image_k += first_image * stride_it + group * stride_ih
    image_v += first_image * stride_jt + group * stride_jh
    dimage_k += first_image * stride + group * (2 * HALF)
    dimage_v += first_image * stride + group * (2 * HALF)
    image_cos += first_image * HALF
    image_sin += first_image * HALF
    limit = tl.load(seen + first_query + token, mask=row_ok, other=0)
    end = tl.max(limit, 0)
    full = 0
    if tokens > 0:
        full = tl.load(seen + first_query) // BLOCK_N * BLOCK_N
    dq_low, dq_high, dw_low, dw_high = visit_source(
        dq_low, dq_high, dw_low, dw_high, q_low, q_high, dout_tile, lse_row, delta, image_k, image_v,
        dimage_k, dimage_v, image_cos, image_sin, w_low, w_high, limit, 0, full, scale, eps, stride_it, stride_jt,
        HALF, BLOCK_H, BLOCK_K, BLOCK_N, GROUPS, NORM, ROTATE, False,
    )  # fmt: skip
    dq_low, dq_high, dw_low, dw_high = visit_source(
        dq_low, dq_high, dw_low, dw_high, q_low, q_high, dout_tile, lse_row, delta, image_k, image_v,
        dimage_k, dimage_v, image_cos, image_sin, w_low, w_high, limit, full, end, scale, eps, stride_it, stride_jt,
        HALF, BLOCK_H, BLOCK_K, BLOCK_N, GROUPS, NORM, ROTATE, True,
    )  # fmt: skip
    clear_rows(dimage_k, end, patches, 2 * HALF, BLOCK_K, BLOCK_N, stride)
    clear_rows(dimage_v, end, patches, 2 * HALF, BLOCK_K, BLOCK_N, stride)
    if NORM:
        store_weight_gradient(k_partials, program, dw_low, dw_high, HALF)

    q_low, q_high = load_halves(q, token * stride_qt + head * stride_qh, row_ok, HALF, BLOCK_H, True)
    cos_tile, sin_tile = load_tables(cos, sin, token, row_ok, HALF, BLOCK_H, ROTATE, True)
    w_low, w_high = load_weight(q_weight, HALF, BLOCK_H, NORM)
    dq_low, dq_high, dw_low, dw_high = finish_gradient(
        dq_low * (scale * LN2), dq_high * (scale * LN2), q_low, q_high, cos_tile, sin_tile, w_low, w_high, eps,
        HALF, NORM, ROTATE,
    )  # fmt: skip
    store_halves(dq + base * (2 * HALF), place * (2 * HALF), row_ok, dq_low, dq_high, HALF)
    if NORM:
        store_weight_gradient(q_partials, program, dw_low, dw_high, HALF)
