"""The package flash-attn for un-routed layers: it has one source of keys, so it cannot serve routed ones."""

from __future__ import annotations

import importlib.util
from typing import cast

import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout

FLASH_ATTENTION = "flash_attention_2"


def flash_attention_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot run; None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed; expected the package flash-attn, which builds from source, or 'auto'"
    if device.type != "cuda":
        return f"the device is {device}; expected a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {dtype}; expected torch.bfloat16 or torch.float16"
    return None


def flash_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, softmax_scale: float) -> Tensor:
    """Causal attention inside each sample of a layout without images.

    Args:
        q: (T, H, K) normed and rotated, bf16 or fp16.
        k: (T, G, K) likewise.
        v: (T, G, K).
        layout: of whole texts.
        softmax_scale: factor on the scores.

    Returns:
        (T, H, K).
    """
    from flash_attn import flash_attn_varlen_func

    bounds, longest = layout.schedule.text_bounds, layout.max_text
    out = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, softmax_scale=softmax_scale, causal=True)
    return cast(Tensor, out)
