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
    load_finished,
    load_halves,
    load_rows,
    load_weight,
    read_sample,
    store_halves,
    store_rows,
    store_weight_gradient,
    through_finish,
)


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


@triton.jit
def key_tile_gradients(
    q, k, v, dout, lse, delta, cos, sin, k_weight, seen, place, is_image, key, key_ok, some, every, tokens, scale, eps,
    stride_k, stride_v, HEADS: tl.constexpr, PACK: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, and of the norm weight: of tokens from ``some`` on, all at ``every``."""
    w_low, w_high = load_weight(k_weight, HALF, BLOCK_H, NORM)
    k_low, k_high = load_finished(
        k, key * stride_k, cos, sin, key, key_ok, w_low, w_high, eps, HALF, BLOCK_H, NORM, ROTATE, True
    )
    columns = tl.arange(0, BLOCK_K)
    values = load_rows(v + key[:, None] * stride_v + columns[None, :], key_ok, columns, 2 * HALF, True)
    dk_low = tl.zeros([key.shape[0], BLOCK_H], tl.float32)
    dk_high = tl.zeros([key.shape[0], BLOCK_H], tl.float32)
    dv = tl.zeros([key.shape[0], BLOCK_K], tl.float32)
    rows = tokens * PACK
    # Not `if`: triton 3.5 fails to compile a loop whose first step an `if` gives.
    first = tl.where(some == tokens, rows, some * PACK // BLOCK_M * BLOCK_M)
    full = tl.minimum((every * PACK + BLOCK_M - 1) // BLOCK_M * BLOCK_M, rows)
    q += place * (2 * HALF)
    dout += place * (2 * HALF)
    dk_low, dk_high, dv = visit_rows(
        dk_low, dk_high, dv, k_low, k_high, values, key, q, dout, lse + place, delta + place,
        seen, is_image, first, full, rows, scale, HEADS, PACK, HALF, BLOCK_H, BLOCK_K, BLOCK_M, True,
    )  # fmt: skip
    dk_low, dk_high, dv = visit_rows(
        dk_low, dk_high, dv, k_low, k_high, values, key, q, dout, lse + place, delta + place,
        seen, is_image, full, rows, rows, scale, HEADS, PACK, HALF, BLOCK_H, BLOCK_K, BLOCK_M, False,
    )  # fmt: skip
    dk_low, dk_high, dw_low, dw_high = through_finish(
        dk_low * (scale * LN2), dk_high * (scale * LN2), k, key * stride_k, cos, sin, key, key_ok, w_low, w_high, eps,
        HALF, BLOCK_H, NORM, ROTATE, True,
    )  # fmt: skip
    return dk_low, dk_high, dv, dw_low, dw_high


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
    first_query, tokens, first_text, _, first_image, patches = read_sample(samples, tl.load(item))
    start = tl.load(item + 1) * BLOCK_N
    key = start + tl.arange(0, BLOCK_N)
    if is_image:
        count = patches
        # The first token that sees any key of the tile, and the first that sees all of them.
        some = tl.minimum(tl.load(first_token + first_image + start), tokens)
        every = tl.minimum(tl.load(first_token + first_image + tl.minimum(start + BLOCK_N, count) - 1), tokens)
        k = image_k + first_image * stride_it + group * stride_ih
        v = image_v + first_image * stride_jt + group * stride_jh
        cos = image_cos + first_image * HALF
        sin = image_sin + first_image * HALF
        dk = dimage_k + (first_image * GROUPS + group) * (2 * HALF)
        dv = dimage_v + (first_image * GROUPS + group) * (2 * HALF)
        stride_kt = stride_it
        stride_vt = stride_jt
    else:
        count = tokens
        some = start
        every = start + BLOCK_N - 1
        k += first_text * stride_kt + group * stride_kh
        v += first_text * stride_vt + group * stride_vh
        cos += first_text * HALF
        sin += first_text * HALF
        dk += (first_text * GROUPS + group) * (2 * HALF)
        dv += (first_text * GROUPS + group) * (2 * HALF)
    if start + BLOCK_N > count:
        every = tokens  # padding scores 0: beside very low scores its weight overflows, unless it is masked
    dk_low, dk_high, dv_tile, dw_low, dw_high = key_tile_gradients(
        q, k, v, dout, lse, delta, cos, sin, k_weight, seen + first_query, first_query * HEADS + group * PACK, is_image,
        key, key < count, some, every, tokens, scale, eps, stride_kt, stride_vt,
        HEADS, PACK, HALF, BLOCK_H, BLOCK_K, BLOCK_M, NORM, ROTATE,
    )  # fmt: skip
    store_rows(dv, key * (GROUPS * 2 * HALF), key < count, dv_tile, 2 * HALF)
    store_halves(dk, key * (GROUPS * 2 * HALF), key < count, dk_low, dk_high, HALF)
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


@triton.jit
def visit_key_source(
    dq_low, dq_high, q_low, q_high, dout, lse, delta, k, v, limit, full, last, scale, stride_k, stride_v,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Go over one source: all rows see ``full`` keys, each those before its ``limit``, none those from ``last`` on."""
    full = full // BLOCK_N * BLOCK_N
    dq_low, dq_high = visit_keys(
        dq_low, dq_high, q_low, q_high, dout, lse, delta, k, v, limit, 0, full, scale,
        stride_k, stride_v, HALF, BLOCK_H, BLOCK_K, BLOCK_N, False,
    )  # fmt: skip
    return visit_keys(
        dq_low, dq_high, q_low, q_high, dout, lse, delta, k, v, limit, full, last, scale,
        stride_k, stride_v, HALF, BLOCK_H, BLOCK_K, BLOCK_N, True,
    )  # fmt: skip


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
    first_query, tokens, first_text, _, first_image, _ = read_sample(samples, tl.load(item))
    rows = tokens * PACK
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    row = tl.minimum(row, rows - 1)
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
    columns = tl.arange(0, BLOCK_K)
    place = token * HEADS + head
    dout += first_query * (HEADS * 2 * HALF)
    dout_tile = load_rows(dout + place[:, None] * (2 * HALF) + columns[None, :], row_ok, columns, 2 * HALF, True)
    lse_row = tl.load(lse + first_query * HEADS + place, mask=row_ok, other=float("inf")) * LOG2E
    delta_row = tl.load(delta + first_query * HEADS + place, mask=row_ok, other=0.0)

    dq_low = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    dq_high = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    first_token = tile * BLOCK_M // PACK
    last_token = (tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1) // PACK
    stride_k: tl.constexpr = GROUPS * 2 * HALF
    dq_low, dq_high = visit_key_source(
        dq_low, dq_high, q_low, q_high, dout_tile, lse_row, delta_row,
        k + first_text * stride_k + group * (2 * HALF), v + first_text * stride_vt + group * stride_vh,
        token + 1, first_token + 1, last_token + 1, scale, stride_k, stride_vt, HALF, BLOCK_H, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    seen += first_query
    dq_low, dq_high = visit_key_source(
        dq_low, dq_high, q_low, q_high, dout_tile, lse_row, delta_row,
        image_k + first_image * stride_k + group * (2 * HALF), image_v + first_image * stride_jt + group * stride_jh,
        tl.load(seen + token), tl.load(seen + first_token), tl.load(seen + last_token), scale,
        stride_k, stride_jt, HALF, BLOCK_H, BLOCK_K, BLOCK_N,
    )  # fmt: skip

    dq_low, dq_high, dw_low, dw_high = through_finish(
        dq_low * (scale * LN2), dq_high * (scale * LN2), q, offsets, cos, sin, token, row_ok, w_low, w_high, eps,
        HALF, BLOCK_H, NORM, ROTATE, True,
    )  # fmt: skip
    store_halves(dq + first_query * (HEADS * 2 * HALF), place * (2 * HALF), row_ok, dq_low, dq_high, HALF)
    if NORM:
        store_weight_gradient(partials, program, dw_low, dw_high, HALF)
