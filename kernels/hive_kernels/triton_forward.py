"""The forward kernel: attention over text and image keys in one softmax.

A row of a tile is one query head of one token: row r of a sample and group is token r // P, head r % P of the group's
P. A K/V tile is thus read once for all heads of its group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import LN2, dot, load_finished, load_rows, load_weight, read_sample, store_rows


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
        k_low, k_high = load_finished(
            k, key * stride_k, cos, sin, key, key_ok, w_low, w_high, eps, HALF, BLOCK_H, NORM, ROTATE, MASKED
        )
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


@triton.jit
def attend_source(
    acc, total, highest, q_low, q_high, k, v, cos, sin, w_low, w_high, limit, full, last, scale, eps,
    stride_k, stride_v, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Go over one source: all rows see ``full`` keys, each those before its ``limit``, none those from ``last`` on."""
    full = full // BLOCK_N * BLOCK_N
    acc, total, highest = attend_keys(
        acc, total, highest, q_low, q_high, k, v, cos, sin, w_low, w_high, limit, 0, full, scale, eps,
        stride_k, stride_v, HALF, BLOCK_H, BLOCK_K, BLOCK_N, NORM, ROTATE, False,
    )  # fmt: skip
    return attend_keys(
        acc, total, highest, q_low, q_high, k, v, cos, sin, w_low, w_high, limit, full, last, scale, eps,
        stride_k, stride_v, HALF, BLOCK_H, BLOCK_K, BLOCK_N, NORM, ROTATE, True,
    )  # fmt: skip


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
    first_query, queries, first_text, texts, first_image, _ = read_sample(samples, sample)
    rows = queries * PACK
    before = texts - queries  # tokens of the sample that are not in q

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    row = tl.minimum(row, rows - 1)  # rows of padding repeat the last one, and are not stored
    token = row // PACK
    head = group * PACK + row % PACK
    q_cos += first_query * HALF
    q_sin += first_query * HALF
    w_low, w_high = load_weight(q_weight, HALF, BLOCK_H, NORM)
    q_low, q_high = load_finished(
        q + first_query * stride_qt, token * stride_qt + head * stride_qh, q_cos, q_sin, token, row_ok, w_low, w_high,
        eps, HALF, BLOCK_H, NORM, ROTATE, True,
    )  # fmt: skip

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
        k += sample.to(tl.int64) * cache_k + group * stride_kh
        v += sample.to(tl.int64) * cache_v + group * stride_vh
    else:
        k += first_text * stride_kt + group * stride_kh
        v += first_text * stride_vt + group * stride_vh
    acc, total, highest = attend_source(
        acc, total, highest, q_low, q_high, k, v, q_cos, q_sin, w_low, w_high,
        before + token + 1, before + first_token + 1, before + last_token + 1, scale, eps,
        stride_kt, stride_vt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, KEY_NORM, KEY_ROTATE,
    )  # fmt: skip
    # Images are in the order of their offsets: a token sees the first so many of its sample's image keys.
    seen += first_query
    acc, total, highest = attend_source(
        acc, total, highest, q_low, q_high,
        image_k + first_image * stride_it + group * stride_ih, image_v + first_image * stride_jt + group * stride_jh,
        image_cos + first_image * HALF, image_sin + first_image * HALF, w_low, w_high,
        tl.load(seen + token), tl.load(seen + first_token), tl.load(seen + last_token), scale, eps,
        stride_it, stride_jt, HALF, BLOCK_H, BLOCK_K, BLOCK_N, KEY_NORM, KEY_ROTATE,
    )  # fmt: skip

    place = token * HEADS + head
    out += first_query * (HEADS * 2 * HALF)
    store_rows(out, place * (2 * HALF), row_ok, acc / total[:, None], 2 * HALF)
    tl.store(lse + first_query * HEADS + place, (highest + tl.log2(total)) * LN2, mask=row_ok)
