"""Forward kernels: attention over text and image keys in one softmax, and norm and rotation on their own.

A row of a tile is one query head of one token: row r of a sample and group is token r // P, head r % P of the group's
P. A K/V tile is thus read once for all heads of its group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import LN2, dot, finish_tile, load_halves, load_rows, load_tables, load_weight, store_halves

SAMPLE_COLUMNS: tl.constexpr = tl.constexpr(6)
"""Of the table of samples: first row of q, rows of q, first text key, text keys, first image key, image keys."""


@triton.jit
def attend_keys(
    acc, total, highest, q_low, q_high, k, v, cos, sin, w_low, w_high, limit, first, last, scale, eps,
    stride_k, stride_v, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go over keys ``first`` to ``last`` of one source, of which each row sees those before its ``limit``."""
    columns = tl.arange(0, BLOCK_K)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_ok = key < last
        k_low, k_high = load_halves(k, key * stride_k, key_ok, HALF, BLOCK_H, MASKED)
        cos_tile, sin_tile = load_tables(cos, sin, key, key_ok, HALF, BLOCK_H, ROTATE, MASKED)
        k_low, k_high = finish_tile(k_low, k_high, cos_tile, sin_tile, w_low, w_high, eps, HALF, NORM, ROTATE)
        scores = dot(q_high, tl.trans(k_high), dot(q_low, tl.trans(k_low)))
        if MASKED:
            scores = tl.where(key[None, :] < limit[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        decay = tl.exp2(highest - higher)
        total = total * decay + tl.sum(weights, 1)
        values = load_rows(v + key[:, None] * stride_v + columns[None, :], key_ok, columns, 2 * HALF, MASKED)
        acc = dot(weights.to(values.dtype), values, acc * decay[:, None])
        highest = higher
    return acc, total, highest


@triton.jit(do_not_specialize=["work", "samples", "seen"])
def hierarchical_attention_forward_kernel(
    q, k, v, image_k, image_v, out, lse, q_cos, q_sin, image_cos, image_sin, q_weight, k_weight,
    work, samples, seen, scale, eps, cache_k, cache_v,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_it, stride_ih, stride_jt, stride_jh,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, FINISH_KEYS: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """One program: one (sample, group) and a tile of its rows. ``scale`` includes log2(e).

    ``work`` (programs / groups, 2) lists sample and tile. With ``FINISH_KEYS`` keys are normed and rotated here; q
    always is. With ``CACHE`` k and v are padded caches, a sample every ``cache_k`` and ``cache_v`` elements.
    """
    program = tl.program_id(0)
    group = program % GROUPS
    sample = tl.load(work + program // GROUPS * 2)
    tile = tl.load(work + program // GROUPS * 2 + 1)
    PACK: tl.constexpr = HEADS // GROUPS
    entry = samples + sample * SAMPLE_COLUMNS
    first_query = tl.load(entry).to(tl.int64)
    rows = tl.load(entry + 1) * PACK
    first_text = tl.load(entry + 2).to(tl.int64)
    before = tl.load(entry + 3) - tl.load(entry + 1)  # tokens of the sample that are not in q
    first_image = tl.load(entry + 4).to(tl.int64)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    row = tl.minimum(row, rows - 1)  # rows of padding repeat the last one, and are not stored
    token = row // PACK
    head = row % PACK
    q_low, q_high = load_halves(
        q + first_query * stride_qt + group * PACK * stride_qh,
        token * stride_qt + head * stride_qh, row_ok, HALF, BLOCK_H, True,
    )  # fmt: skip
    cos_tile, sin_tile = load_tables(
        q_cos + first_query * HALF, q_sin + first_query * HALF, token, row_ok, HALF, BLOCK_H, ROTATE, True
    )
    w_low, w_high = load_weight(q_weight, HALF, BLOCK_H, NORM)
    q_low, q_high = finish_tile(q_low, q_high, cos_tile, sin_tile, w_low, w_high, eps, HALF, NORM, ROTATE)

    KEY_NORM: tl.constexpr = NORM if FINISH_KEYS else 0
    KEY_ROTATE: tl.constexpr = ROTATE and FINISH_KEYS
    w_low, w_high = load_weight(k_weight, HALF, BLOCK_H, KEY_NORM)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    first_token = tile * BLOCK_M // PACK
    last_token = (tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1) // PACK

    # Text first: its first key is seen by every row, so that no maximum stays at minus infinity.
    if CACHE:
        text_k = k + sample.to(tl.int64) * cache_k + group * stride_kh
        text_v = v + sample.to(tl.int64) * cache_v + group * stride_vh
    else:
        text_k = k + first_text * stride_kt + group * stride_kh
        text_v = v + first_text * stride_vt + group * stride_vh
    text_cos = q_cos + first_query * HALF
    text_sin = q_sin + first_query * HALF
    limit = before + token + 1
    end = before + last_token + 1
    full = (before + first_token + 1) // BLOCK_N * BLOCK_N
    acc, total, highest = attend_keys(
        acc, total, highest, q_low, q_high, text_k, text_v, text_cos, text_sin, w_low, w_high, limit, 0, full,
        scale, eps, stride_kt, stride_vt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, KEY_NORM, KEY_ROTATE, False,
    )  # fmt: skip
    acc, total, highest = attend_keys(
        acc, total, highest, q_low, q_high, text_k, text_v, text_cos, text_sin, w_low, w_high, limit, full, end,
        scale, eps, stride_kt, stride_vt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, KEY_NORM, KEY_ROTATE, True,
    )  # fmt: skip

    # Images are in the order of their offsets: a token sees the first so many of its sample's image keys.
    image_k += first_image * stride_it + group * stride_ih
    image_v += first_image * stride_jt + group * stride_jh
    image_cos += first_image * HALF
    image_sin += first_image * HALF
    limit = tl.load(seen + first_query + token)
    end = tl.load(seen + first_query + last_token)
    full = tl.load(seen + first_query + first_token) // BLOCK_N * BLOCK_N
    acc, total, highest = attend_keys(
        acc, total, highest, q_low, q_high, image_k, image_v, image_cos, image_sin, w_low, w_high, limit, 0, full,
        scale, eps, stride_it, stride_jt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, KEY_NORM, KEY_ROTATE, False,
    )  # fmt: skip
    acc, total, highest = attend_keys(
        acc, total, highest, q_low, q_high, image_k, image_v, image_cos, image_sin, w_low, w_high, limit, full, end,
        scale, eps, stride_it, stride_jt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, KEY_NORM, KEY_ROTATE, True,
    )  # fmt: skip

    columns = tl.arange(0, BLOCK_K)
    place = token * HEADS + group * PACK + head
    out += first_query * HEADS * (2 * HALF)
    tl.store(
        out + place[:, None] * (2 * HALF) + columns[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=row_ok[:, None] & (columns < 2 * HALF)[None, :],
    )
    tl.store(lse + first_query * HEADS + place, (highest + tl.log2(total)) * LN2, mask=row_ok)


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    x, y, cos, sin, weight, count, eps, stride_t, stride_h,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Norm and rotate ``count`` rows (token, head) of x into y, which is contiguous."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < count
    token = row // HEADS
    head = row % HEADS
    low, high = load_halves(x, token * stride_t + head * stride_h, row_ok, HALF, BLOCK_H, True)
    cos_tile, sin_tile = load_tables(cos, sin, token, row_ok, HALF, BLOCK_H, ROTATE, True)
    w_low, w_high = load_weight(weight, HALF, BLOCK_H, NORM)
    low, high = finish_tile(low, high, cos_tile, sin_tile, w_low, w_high, eps, HALF, NORM, ROTATE)
    store_halves(y, row * (2 * HALF), row_ok, low, high, HALF)
