"""Which implementation serves a call of the public op, and why."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch

from .tiles import INTERPRETED

BACKENDS = ("auto", "triton", "sdpa", "reference")
MAX_HEAD_DIM = 256
HAS_TRITON = importlib.util.find_spec("triton") is not None
"""torch's wheels for CPUs come without Triton."""


class Choice(NamedTuple):
    """A backend and the reason for it, as a log prints them."""

    backend: str
    reason: str


def choose_backend(
    backend: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    decoding: bool = False,
    gradient: bool = True,
) -> Choice:
    """The backend that serves a call.

    Args:
        backend: as in `hierarchical_attention`; "auto" takes Triton on a GPU wherever it can, and SDPA elsewhere.
        device: of q.
        dtype: of q.
        head_dim: K.
        decoding: whether the layout has query lengths, so that keys come finished.
        gradient: whether q, k, v, image_k, image_v or q_norm_weight needs a gradient.

    Raises:
        ValueError: a backend asked for by name cannot serve the call.
    """
    if backend == "auto":
        if device.type != "cuda":
            return Choice("sdpa", "no GPU")
        refusal = _triton_refuses(device, dtype, head_dim, decoding=decoding, gradient=gradient)
        return Choice("triton", "a GPU and Triton") if refusal is None else Choice("sdpa", refusal)
    if backend == "triton":
        refusal = _triton_refuses(device, dtype, head_dim, decoding=decoding, gradient=gradient)
        if refusal is not None:
            raise ValueError(f"backend is 'triton', but {refusal}")
    return Choice(backend, "asked for")


def _triton_refuses(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, decoding: bool, gradient: bool
) -> str | None:
    if dtype == torch.float64:
        return "q is torch.float64; expected torch.bfloat16, torch.float16 or torch.float32"
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        return f"q has head dim {head_dim}; expected an even number of at most {MAX_HEAD_DIM}"
    if decoding and gradient:
        return "q, k, v, image_k, image_v or q_norm_weight needs a gradient; expected none while decoding"
    if device.type == "meta":  # shapes alone, for which the registered op needs no Triton
        return None
    if not HAS_TRITON:
        return "Triton is not installed; expected the package triton"
    if device.type != "cuda" and not INTERPRETED:
        return f"q is on {device}; expected a GPU, or TRITON_INTERPRET=1 set before Python starts"
    return None
