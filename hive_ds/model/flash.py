"""FlashAttention from a library for un-routed layers: it has one source of keys, so it cannot serve routed ones.

Two names: the package flash-attn, and the same algorithm inside torch (2.11 and later).
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout

_varlen_attn: Any = None
with contextlib.suppress(ImportError):  # torch before 2.10 has none
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn

FLASH_ATTENTION = "flash_attention_2"
TORCH_FLASH = "torch_flash"
FLASH_BACKENDS = (FLASH_ATTENTION, TORCH_FLASH)
MIN_CAPABILITY = (8, 0)
"""Oldest GPUs that either runs on."""
# Read here and not at the call, which torch.compile traces.
_OPTIONS = () if _varlen_attn is None else tuple(inspect.signature(_varlen_attn).parameters)
_GROUPED_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _OPTIONS else {}
"""From torch 2.12 on fewer key than query heads must be asked for."""


@dataclass(frozen=True)
class TextBounds:
    """Where the whole texts of a batch begin and end.

    Attributes:
        bounds: (B + 1,) int32, first token of each text and the end of the last.
        longest: tokens of the longest text.
    """

    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, layout: AttentionLayout) -> TextBounds:
        """Of a layout of whole texts."""
        return cls(layout.schedule.text_bounds, layout.max_text)


def flash_attention_refusal(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the flash attention of that name cannot run; None if it can."""
    missing = _missing(name)
    if missing is not None:
        return missing
    if device.type != "cuda":
        return f"the device is {device}; expected a GPU"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"the GPU is {torch.cuda.get_device_name(device)}; expected one of Ampere or later"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {dtype}; expected torch.bfloat16 or torch.float16"
    if head_dim % 8 or head_dim > 256:
        return f"the head dim is {head_dim}; expected a multiple of 8, at most 256"
    return None


def flash_attention(name: str, q: Tensor, k: Tensor, v: Tensor, texts: TextBounds, softmax_scale: float) -> Tensor:
    """Causal attention inside each text.

    Args:
        name: one of `FLASH_BACKENDS`.
        q: (T, H, K) normed and rotated, bf16 or fp16.
        k: (T, G, K) likewise.
        v: (T, G, K).
        texts: the packed batch.
        softmax_scale: factor on the scores.

    Returns:
        (T, H, K).
    """
    where = (texts.bounds, texts.bounds, texts.longest, texts.longest)
    if name == FLASH_ATTENTION:
        from flash_attn import flash_attn_varlen_func

        return cast(Tensor, flash_attn_varlen_func(q, k, v, *where, softmax_scale=softmax_scale, causal=True))
    causal = (-1, 0)  # a window of all tokens before, and none after
    return cast(Tensor, _varlen_attn(q, k, v, *where, scale=softmax_scale, window_size=causal, **_GROUPED_HEADS))


def _missing(name: str) -> str | None:
    if name == FLASH_ATTENTION:
        if importlib.util.find_spec("flash_attn") is None:
            return "flash-attn is not installed; expected the package flash-attn, which builds from source, or 'auto'"
        return None
    if "window_size" not in _OPTIONS:
        return f"torch {torch.__version__} has no attention of variable length with a window; expected torch 2.11"
    return None
