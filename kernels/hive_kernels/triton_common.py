"""What the Triton kernels share: loading half rows, norm and rotation and their gradients, the matrix product.

The head dim K is loaded as two halves, so that the rotation of a row is two multiply-adds of its halves. Each half is
``HALF`` = K/2 wide and held in a tile of ``BLOCK_H`` columns, the next power of two (16 or more); the rest is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_cache import use_local_cache
from .tiles import INTERPRETED

use_local_cache()  # before anything is compiled: every kernel module imports this one

UPCAST_BF16 = tl.constexpr(INTERPRETED)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
NORM_NONE: tl.constexpr = tl.constexpr(0)
NORM_PRE_ROPE: tl.constexpr = tl.constexpr(1)
NORM_POST_ROPE: tl.constexpr = tl.constexpr(2)


@triton.jit
def dot(a, b, acc=None):
    """``a @ b + acc`` in fp32, true fp32 for fp32 operands. The interpreter's bf16 product is garbage: fp32 there."""
    if UPCAST_BF16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_rows(pointers, row_ok, columns, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows of ``WIDTH`` columns, zero where not ``row_ok`` (asked only if ``MASKED``) and past the width."""
    BLOCK: tl.constexpr = pointers.shape[1]
    if MASKED:
        if WIDTH == BLOCK:
            tile = tl.load(pointers, mask=row_ok[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=row_ok[:, None] & (columns < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == BLOCK:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def load_halves(base, offsets, row_ok, HALF: tl.constexpr, BLOCK_H: tl.constexpr, MASKED: tl.constexpr):
    """The two halves of rows that start at ``base + offsets``."""
    columns = tl.arange(0, BLOCK_H)
    pointers = base + offsets[:, None] + columns[None, :]
    low = load_rows(pointers, row_ok, columns, HALF, MASKED)
    high = load_rows(pointers + HALF, row_ok, columns, HALF, MASKED)
    return low, high


@triton.jit
def store_halves(base, offsets, row_ok, low, high, HALF: tl.constexpr):
    """Write two halves, cast to the dtype that ``base`` points to."""
    columns = tl.arange(0, low.shape[1])
    pointers = base + offsets[:, None] + columns[None, :]
    mask = row_ok[:, None] & (columns < HALF)[None, :]
    tl.store(pointers, low.to(base.dtype.element_ty), mask=mask)
    tl.store(pointers + HALF, high.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(weight, HALF: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr):
    """The halves of a norm weight in fp32; zeros without norm."""
    columns = tl.arange(0, BLOCK_H)
    if NORM == NORM_NONE:
        low = tl.zeros([BLOCK_H], tl.float32)
        high = low
    else:
        low = tl.load(weight + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        high = tl.load(weight + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def load_tables(
    cos, sin, rows, row_ok, HALF: tl.constexpr, BLOCK_H: tl.constexpr, ROTATE: tl.constexpr, MASKED: tl.constexpr
):
    """Rotation of ``rows``, from tables (., HALF) in fp32; nothing to rotate by is (0, 0), and never used."""
    if ROTATE:
        columns = tl.arange(0, BLOCK_H)
        offsets = rows[:, None] * HALF + columns[None, :]
        cos_tile = load_rows(cos + offsets, row_ok, columns, HALF, MASKED)
        sin_tile = load_rows(sin + offsets, row_ok, columns, HALF, MASKED)
    else:
        cos_tile = 0.0
        sin_tile = 0.0
    return cos_tile, sin_tile


@triton.jit
def inverse_rms(low, high, eps, HALF: tl.constexpr):
    """One over the root mean square of rows; finite for rows of padding too, which are zero, even if eps is."""
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF)
    return tl.rsqrt(tl.maximum(mean + eps, 1e-37))


@triton.jit
def rms_norm(low, high, w_low, w_high, eps, HALF: tl.constexpr):
    """Rows over their root mean square, times the weight."""
    inverse = inverse_rms(low, high, eps, HALF)[:, None]
    return low * inverse * w_low[None, :], high * inverse * w_high[None, :]


@triton.jit
def finish_tile(low, high, cos, sin, w_low, w_high, eps, HALF: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr):
    """Norm and rotate rows in fp32; the result has the dtype that came in."""
    dtype: tl.constexpr = low.dtype
    if (NORM != NORM_NONE) or ROTATE:
        low = low.to(tl.float32)
        high = high.to(tl.float32)
        if NORM == NORM_PRE_ROPE:
            low, high = rms_norm(low, high, w_low, w_high, eps, HALF)
        if ROTATE:
            low, high = low * cos - high * sin, high * cos + low * sin
        if NORM == NORM_POST_ROPE:
            low, high = rms_norm(low, high, w_low, w_high, eps, HALF)
        low = low.to(dtype)
        high = high.to(dtype)
    return low, high


@triton.jit
def rms_norm_gradient(d_low, d_high, low, high, w_low, w_high, eps, HALF: tl.constexpr):
    """Gradient of `rms_norm`: of its rows, and of its weight summed over the tile's rows."""
    inverse = inverse_rms(low, high, eps, HALF)[:, None]
    low = low * inverse
    high = high * inverse
    dw_low = tl.sum(d_low * low, 0)
    dw_high = tl.sum(d_high * high, 0)
    d_low = d_low * w_low[None, :]
    d_high = d_high * w_high[None, :]
    mean = ((tl.sum(d_low * low, 1) + tl.sum(d_high * high, 1)) / (2 * HALF))[:, None]
    return (d_low - low * mean) * inverse, (d_high - high * mean) * inverse, dw_low, dw_high


@triton.jit
def finish_gradient(
    d_low, d_high, low, high, cos, sin, w_low, w_high, eps,
    HALF: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Gradient of `finish_tile` at rows ``low``, ``high`` (as they came in): of the rows and of the norm weight."""
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    dw_low = tl.zeros([d_low.shape[1]], tl.float32)
    dw_high = dw_low
    if NORM == NORM_POST_ROPE:
        y_low = low
        y_high = high
        if ROTATE:
            y_low = low * cos - high * sin
            y_high = high * cos + low * sin
        d_low, d_high, dw_low, dw_high = rms_norm_gradient(d_low, d_high, y_low, y_high, w_low, w_high, eps, HALF)
    if ROTATE:
        d_low, d_high = d_low * cos + d_high * sin, d_high * cos - d_low * sin
    if NORM == NORM_PRE_ROPE:
        d_low, d_high, dw_low, dw_high = rms_norm_gradient(d_low, d_high, low, high, w_low, w_high, eps, HALF)
    return d_low, d_high, dw_low, dw_high


@triton.jit
def store_weight_gradient(partials, program, low, high, HALF: tl.constexpr):
    """One program's share of a norm weight's gradient: row ``program`` of ``partials`` (programs, K)."""
    columns = tl.arange(0, low.shape[0])
    pointers = partials + program.to(tl.int64) * (2 * HALF) + columns
    tl.store(pointers, low, mask=columns < HALF)
    tl.store(pointers + HALF, high, mask=columns < HALF)


@triton.jit
def load_finished(
    base, offsets, cos, sin, rows, row_ok, w_low, w_high, eps,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows at ``base + offsets``, normed and rotated by rows ``rows`` of the tables."""
    low, high = load_halves(base, offsets, row_ok, HALF, BLOCK_H, MASKED)
    cos_tile, sin_tile = load_tables(cos, sin, rows, row_ok, HALF, BLOCK_H, ROTATE, MASKED)
    return finish_tile(low, high, cos_tile, sin_tile, w_low, w_high, eps, HALF, NORM, ROTATE)


@triton.jit
def through_finish(
    d_low, d_high, base, offsets, cos, sin, rows, row_ok, w_low, w_high, eps,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of `load_finished`'s rows and weight. Rows are read again: cheaper than registers that hold them."""
    low, high = load_halves(base, offsets, row_ok, HALF, BLOCK_H, MASKED)
    cos_tile, sin_tile = load_tables(cos, sin, rows, row_ok, HALF, BLOCK_H, ROTATE, MASKED)
    return finish_gradient(d_low, d_high, low, high, cos_tile, sin_tile, w_low, w_high, eps, HALF, NORM, ROTATE)


@triton.jit
def store_rows(base, offsets, row_ok, tile, WIDTH: tl.constexpr):
    """Write whole rows, cast to the dtype that ``base`` points to."""
    columns = tl.arange(0, tile.shape[1])
    mask = row_ok[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def read_sample(samples, sample):
    """A line of the table: first row of q, rows of q, first text key, text keys, first image key, image keys."""
    entry = samples + sample * 6
    first_query = tl.load(entry).to(tl.int64)
    first_text = tl.load(entry + 2).to(tl.int64)
    first_image = tl.load(entry + 4).to(tl.int64)
    return first_query, tl.load(entry + 1), first_text, tl.load(entry + 3), first_image, tl.load(entry + 5)
