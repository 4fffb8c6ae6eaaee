"""Backward kernels of long text, two passes: gradients of keys and values, then of queries.

The program that owns a tile of keys goes over all rows that see it, all heads of the group among them, and writes dK
and dV once; the program that owns a tile of rows goes over the keys it sees and writes dQ once: nothing is added up in
memory. Each norms and rotates its own tile, back again at the end, and reads the other side finished.
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


@triton.jit(do_not_specialize=["count"])
def delta_kernel(out, dout, dlse, delta, count, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each of ``count`` rows: the sum of out * dout, minus the gradient of lse."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < count
    columns = tl.arange(0, BLOCK_K)
    offsets = row[:, None] * HEAD_DIM + columns[None, :]
    out_tile = load_rows(out + offsets, row_ok, columns, HEAD_DIM, True).to(tl.float32)
    dout_tile = load_rows(dout + offsets, row_ok, columns, HEAD_DIM, True).to(tl.float32)
    own = tl.load(dlse + row, mask=row_ok, other=0.0)
    tl.store(delta + row, tl.sum(out_tile * dout_tile, 1) - own, mask=row_ok)


@triton.jit
def visit_rows(
    dk_low, dk_high, dv, k_low, k_high, values, key, q, dout, lse, delta, seen, is_image, first, last, rows, scale,
    HEADS: tl.constexpr, PACK: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what rows ``first`` to ``last`` of the sample give to the gradients of one tile of keys."""
    columns = tl.arange(0, BLOCK_K)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        row_ok = row < rows
        token = row // PACK
        place = token * HEADS + row % PACK
        q_low, q_high = load_halves(q, place * (2 * HALF), row_ok, HALF, BLOCK_H, True)
        lse_row = tl.load(lse + place, mask=row_ok, other=float("inf")) * LOG2E
        scores = dot(k_high, tl.trans(q_high), dot(k_low, tl.trans(q_low)))
        weights = tl.exp2(scores * scale - lse_row[None, :])
        if MASKED:
            limit = token + 1
            if is_image:
                limit = tl.load(seen + token, mask=row_ok, other=0)
            weights = tl.where(key[:, None] < limit[None, :], weights, 0.0)
        dout_tile = load_rows(dout + place[:, None] * (2 * HALF) + columns[None, :], row_ok, columns, 2 * HALF, True)
        dv = dot(weights.to(dout_tile.dtype), dout_tile, dv)
        delta_row = tl.load(delta + place, mask=row_ok, other=0.0)
        d_scores = (weights * (dot(values, tl.trans(dout_tile)) - delta_row[None, :])).to(q_low.dtype)
        dk_low = dot(d_scores, q_low, dk_low)
        dk_high = dot(d_scores, q_high, dk_high)
    return dk_low, dk_high, dv


@triton.jit(do_not_specialize=["work", "samples", "seen", "first_token"])
def hierarchical_attention_key_gradient_kernel(
    q, k, v, image_k, image_v, dout, lse, delta, dk, dv, dimage_k, dimage_v, partials,
    cos, sin, image_cos, image_sin, k_weight, work, samples, seen, first_token, scale, eps,
    stride_kt, stride_kh, stride_vt, stride_vh, stride_it, stride_ih, stride_jt, stride_jh,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of text or image keys of one (sample, group). q is finished, k and image_k are not.

    ``work`` (programs / groups, 3) lists sample, tile and whether of its image keys.
    """
    program = tl.program_id(0)
    group = program % GROUPS
    item = work + program // GROUPS * 3
    is_image = tl.load(item + 2) != 0
    PACK: tl.constexpr = HEADS // GROUPS
    entry = samples + tl.load(item) * SAMPLE_COLUMNS
    first_query = tl.load(entry).to(tl.int64)
    tokens = tl.load(entry + 1)
    start = tl.load(item + 1) * BLOCK_N
    key = start + tl.arange(0, BLOCK_N)
    if is_image:
        first_key = tl.load(entry + 4).to(tl.int64)
        count = tl.load(entry + 5)
        last = tl.minimum(start + BLOCK_N, count) - 1
        # The first token that sees any key of the tile, and the first that sees all of them.
        some = tl.minimum(tl.load(first_token + first_key + start), tokens)
        every = tl.minimum(tl.load(first_token + first_key + last), tokens)
        k_base = image_k + first_key * stride_it + group * stride_ih
        v_base = image_v + first_key * stride_jt + group * stride_jh
        stride_k = stride_it
        stride_v = stride_jt
        cos_base = image_cos + first_key * HALF
        sin_base = image_sin + first_key * HALF
        dk_base = dimage_k + (first_key * GROUPS + group) * (2 * HALF)
        dv_base = dimage_v + (first_key * GROUPS + group) * (2 * HALF)
    else:
        first_key = tl.load(entry + 2).to(tl.int64)
        count = tokens
        some = start
        every = tl.minimum(start + BLOCK_N, count) - 1
        k_base = k + first_key * stride_kt + group * stride_kh
        v_base = v + first_key * stride_vt + group * stride_vh
        stride_k = stride_kt
        stride_v = stride_vt
        cos_base = cos + first_key * HALF
        sin_base = sin + first_key * HALF
        dk_base = dk + (first_key * GROUPS + group) * (2 * HALF)
        dv_base = dv + (first_key * GROUPS + group) * (2 * HALF)
    key_ok = key < count

    k_low, k_high = load_halves(k_base, key * stride_k, key_ok, HALF, BLOCK_H, True)
    cos_tile, sin_tile = load_tables(cos_base, sin_base, key, key_ok, HALF, BLOCK_H, ROTATE, True)
    w_low, w_high = load_weight(k_weight, HALF, BLOCK_H, NORM)
    k_low, k_high = finish_tile(k_low, k_high, cos_tile, sin_tile, w_low, w_high, eps, HALF, NORM, ROTATE)
    columns = tl.arange(0, BLOCK_K)
    values = load_rows(v_base + key[:, None] * stride_v + columns[None, :], key_ok, columns, 2 * HALF, True)

    dk_low = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dk_high = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    rows = tokens * PACK
    first = rows if some == tokens else some * PACK // BLOCK_M * BLOCK_M
    full = tl.minimum((every * PACK + BLOCK_M - 1) // BLOCK_M * BLOCK_M, rows)
    place = first_query * HEADS + group * PACK
    q += place * (2 * HALF)
    dout += place * (2 * HALF)
    dk_low, dk_high, dv_tile = visit_rows(
        dk_low, dk_high, dv_tile, k_low, k_high, values, key, q, dout, lse + place, delta + place,
        seen + first_query, is_image, first, full, rows, scale, HEADS, PACK, HALF, BLOCK_H, BLOCK_K, BLOCK_M, True,
    )  # fmt: skip
    dk_low, dk_high, dv_tile = visit_rows(
        dk_low, dk_high, dv_tile, k_low, k_high, values, key, q, dout, lse + place, delta + place,
        seen + first_query, is_image, full, rows, rows, scale, HEADS, PACK, HALF, BLOCK_H, BLOCK_K, BLOCK_M, False,
    )  # fmt: skip

    tl.store(
        dv_base + key[:, None] * (GROUPS * 2 * HALF) + columns[None, :],
        dv_tile.to(dv.dtype.element_ty),
        mask=key_ok[:, None] & (columns < 2 * HALF)[None, :],
    )
    k_low, k_high = load_halves(k_base, key * stride_k, key_ok, HALF, BLOCK_H, True)
    cos_tile, sin_tile = load_tables(cos_base, sin_base, key, key_ok, HALF, BLOCK_H, ROTATE, True)
    dk_low, dk_high, dw_low, dw_high = finish_gradient(
        dk_low * (scale * LN2), dk_high * (scale * LN2), k_low, k_high, cos_tile, sin_tile, w_low, w_high, eps,
        HALF, NORM, ROTATE,
    )  # fmt: skip
    store_halves(dk_base, key * (GROUPS * 2 * HALF), key_ok, dk_low, dk_high, HALF)
    if NORM:
        store_weight_gradient(partials, program, dw_low, dw_high, HALF)


@triton.jit
def visit_keys(
    dq_low, dq_high, q_low, q_high, dout, lse, delta, k, v, limit, first, last, scale, stride_k, stride_v,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what keys ``first`` to ``last`` of one source give to the gradients of one tile of rows."""
    columns = tl.arange(0, BLOCK_K)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_ok = key < last
        k_low, k_high = load_halves(k, key * stride_k, key_ok, HALF, BLOCK_H, MASKED)
        values = load_rows(v + key[:, None] * stride_v + columns[None, :], key_ok, columns, 2 * HALF, MASKED)
        scores = dot(q_high, tl.trans(k_high), dot(q_low, tl.trans(k_low)))
        weights = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            weights = tl.where(key[None, :] < limit[:, None], weights, 0.0)
        d_scores = (weights * (dot(dout, tl.trans(values)) - delta[:, None])).to(k_low.dtype)
        dq_low = dot(d_scores, k_low, dq_low)
        dq_high = dot(d_scores, k_high, dq_high)
    return dq_low, dq_high


@triton.jit(do_not_specialize=["work", "samples", "seen"])
def hierarchical_attention_query_gradient_kernel(
    q, k, v, image_k, image_v, dout, lse, delta, dq, partials, cos, sin, q_weight, work, samples, seen, scale, eps,
    stride_qt, stride_qh, stride_vt, stride_vh, stride_jt, stride_jh,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows of one (sample, group), as in the forward. k and image_k are finished, q is not."""
    program = tl.program_id(0)
    group = program % GROUPS
    item = work + program // GROUPS * 2
    tile = tl.load(item + 1)
    PACK: tl.constexpr = HEADS // GROUPS
    entry = samples + tl.load(item) * SAMPLE_COLUMNS
    first_query = tl.load(entry).to(tl.int64)
    rows = tl.load(entry + 1) * PACK
    first_text = tl.load(entry + 2).to(tl.int64)
    first_image = tl.load(entry + 4).to(tl.int64)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    row = tl.minimum(row, rows - 1)
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
    place = token * HEADS + group * PACK + head
    dout += first_query * HEADS * (2 * HALF)
    dout_tile = load_rows(dout + place[:, None] * (2 * HALF) + columns[None, :], row_ok, columns, 2 * HALF, True)
    lse_row = tl.load(lse + first_query * HEADS + place, mask=row_ok, other=float("inf")) * LOG2E
    delta_row = tl.load(delta + first_query * HEADS + place, mask=row_ok, other=0.0)

    dq_low = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    dq_high = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    first_token = tile * BLOCK_M // PACK
    last_token = (tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1) // PACK
    stride_k: tl.constexpr = GROUPS * 2 * HALF
    k += first_text * stride_k + group * (2 * HALF)
    v += first_text * stride_vt + group * stride_vh
    full = (first_token + 1) // BLOCK_N * BLOCK_N
    dq_low, dq_high = visit_keys(
        dq_low, dq_high, q_low, q_high, dout_tile, lse_row, delta_row, k, v, token + 1, 0, full, scale,
        stride_k, stride_vt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, False,
    )  # fmt: skip
    dq_low, dq_high = visit_keys(
        dq_low, dq_high, q_low, q_high, dout_tile, lse_row, delta_row, k, v, token + 1, full, last_token + 1, scale,
        stride_k, stride_vt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, True,
    )  # fmt: skip
    image_k += first_image * stride_k + group * (2 * HALF)
    image_v += first_image * stride_jt + group * stride_jh
    limit = tl.load(seen + first_query + token)
    full = tl.load(seen + first_query + first_token) // BLOCK_N * BLOCK_N
    end = tl.load(seen + first_query + last_token)
    dq_low, dq_high = visit_keys(
        dq_low, dq_high, q_low, q_high, dout_tile, lse_row, delta_row, image_k, image_v, limit, 0, full, scale,
        stride_k, stride_jt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, False,
    )  # fmt: skip
    dq_low, dq_high = visit_keys(
        dq_low, dq_high, q_low, q_high, dout_tile, lse_row, delta_row, image_k, image_v, limit, full, end, scale,
        stride_k, stride_jt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, True,
    )  # fmt: skip

    q_low, q_high = load_halves(q, token * stride_qt + head * stride_qh, row_ok, HALF, BLOCK_H, True)
    cos_tile, sin_tile = load_tables(cos, sin, token, row_ok, HALF, BLOCK_H, ROTATE, True)
    dq_low, dq_high, dw_low, dw_high = finish_gradient(
        dq_low * (scale * LN2), dq_high * (scale * LN2), q_low, q_high, cos_tile, sin_tile, w_low, w_high, eps,
        HALF, NORM, ROTATE,
    )  # fmt: skip
    dq += first_query * HEADS * (2 * HALF)
    store_halves(dq, place * (2 * HALF), row_ok, dq_low, dq_high, HALF)
    if NORM:
        store_weight_gradient(partials, program, dw_low, dw_high, HALF)
