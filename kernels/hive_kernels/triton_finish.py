"""What goes over rows one by one, in one launch: norm and rotation of keys and queries, and delta for backward."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import load_finished, load_halves, load_weight, store_halves


@triton.jit
def finish_rows(
    x, y, cos, sin, weight, program, count, eps, stride_t, stride_h,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Norm and rotate a program's share of ``count`` rows (token, head) of x into y, which is contiguous."""
    row = program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < count
    token = row // HEADS
    head = row % HEADS
    w_low, w_high = load_weight(weight, HALF, BLOCK_H, NORM)
    low, high = load_finished(
        x, token * stride_t + head * stride_h, cos, sin, token, row_ok, w_low, w_high, eps,
        HALF, BLOCK_H, NORM, ROTATE, True,
    )  # fmt: skip
    store_halves(y, row * (2 * HALF), row_ok, low, high, HALF)


@triton.jit
def delta_rows(
    out, dout, dlse, delta, program, count, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
    DLSE: tl.constexpr,
):  # fmt: skip
    """Of a program's share of ``count`` rows: the sum of out * dout, minus the gradient of lse."""
    row = program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < count
    low, high = load_halves(out, row * (2 * HALF), row_ok, HALF, BLOCK_H, True)
    d_low, d_high = load_halves(dout, row * (2 * HALF), row_ok, HALF, BLOCK_H, True)
    products = low.to(tl.float32) * d_low.to(tl.float32) + high.to(tl.float32) * d_high.to(tl.float32)
    total = tl.sum(products, 1)
    if DLSE:
        total -= tl.load(dlse + row, mask=row_ok, other=0.0)
    tl.store(delta + row, total, mask=row_ok)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "image_rows"])
def finish_kernel(
    q, k, image_k, finished_q, finished_k, finished_image_k, out, dout, dlse, delta,
    cos, sin, image_cos, image_sin, q_weight, k_weight, q_rows, k_rows, image_rows, eps,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_it, stride_ih,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, BACKWARD: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """Norm and rotate all keys; with ``BACKWARD`` all queries too, and make delta. First programs take queries.

    Without ``DLSE`` nothing depends on lse, and dlse is not read.
    """
    FINISH: tl.constexpr = (NORM != 0) or ROTATE
    program = tl.program_id(0)
    if BACKWARD:
        q_programs = tl.cdiv(q_rows, BLOCK_M)
        if program < q_programs:
            if FINISH:
                finish_rows(
                    q, finished_q, cos, sin, q_weight, program, q_rows, eps, stride_qt, stride_qh,
                    HEADS, HALF, BLOCK_H, BLOCK_M, NORM, ROTATE,
                )  # fmt: skip
            delta_rows(out, dout, dlse, delta, program, q_rows, HALF, BLOCK_H, BLOCK_M, DLSE)
        program -= q_programs
    if FINISH:
        k_programs = tl.cdiv(k_rows, BLOCK_M)
        if program >= k_programs:
            finish_rows(
                image_k, finished_image_k, image_cos, image_sin, k_weight, program - k_programs, image_rows, eps,
                stride_it, stride_ih, GROUPS, HALF, BLOCK_H, BLOCK_M, NORM, ROTATE,
            )  # fmt: skip
        elif program >= 0:
            finish_rows(
                k, finished_k, cos, sin, k_weight, program, k_rows, eps, stride_kt, stride_kh,
                GROUPS, HALF, BLOCK_H, BLOCK_M, NORM, ROTATE,
            )  # fmt: skip
