"""What the public calls refuse. Every message names the argument, what it was and what it must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import BACKENDS
from .layout import AttentionLayout

QK_NORMS = ("none", "pre_rope", "post_rope")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_backend(backend: str) -> None:
    """Refuse a backend that this version does not have."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {_choices(BACKENDS)}")


def check_number(name: str, value: float, low: float | None = None) -> float:
    """Refuse what is no finite number, is not positive, or with ``low`` is below it."""
    number = isinstance(value, (int, float)) and math.isfinite(value)
    if not number or (value <= 0 if low is None else value < low):
        raise ValueError(
            f"{name} is {value!r}; expected a {'positive ' if low is None else ''}number"
            f"{'' if low is None else f' of at least {low}'}"
        )
    return float(value)


def check_dtype(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Refuse a tensor of no dtype among ``dtypes``."""
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}; expected one of {_choices(dtypes)}")


def check_text(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> None:
    """Refuse q, k and v that do not fit the layout or each other."""
    check_dtype("q", q)
    if q.device != layout.device:
        raise ValueError(f"q is on {q.device}; expected {layout.device}, the layout's device")
    if q.ndim != 3 or q.shape[0] != layout.num_queries:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected ({layout.num_queries}, H, K), its rows by the layout")
    _check_keys(k, q, layout)
    check_like("k", k, q)
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected {tuple(k.shape)}, the shape of k")
    check_like("v", v, q)


def _check_keys(k: Tensor, q: Tensor, layout: AttentionLayout) -> None:
    heads, head_dim = q.shape[1:]
    packed = k.ndim == 3 and k.shape[0] == layout.num_text
    cache = layout.decoding and k.ndim == 4 and k.shape[0] == layout.num_samples and k.shape[1] >= layout.max_text
    if not (packed or cache) or k.shape[-1] != head_dim:
        form = f"({layout.num_text}, G, {head_dim})"
        if layout.decoding:
            form += f" or ({layout.num_samples}, at least {layout.max_text}, G, {head_dim})"
        raise ValueError(f"k has shape {tuple(k.shape)}; expected {form}, by the layout and q")
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        raise ValueError(f"k has {k.shape[-2]} heads; expected a number that divides q's {heads}")


def check_like(name: str, x: Tensor, q: Tensor) -> None:
    """Refuse a tensor of another dtype or device than q."""
    if x.dtype != q.dtype:
        raise ValueError(f"{name} is {x.dtype}; expected {q.dtype} like q")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}; expected {q.device} like q")


def check_images(image_k: Tensor | None, image_v: Tensor | None, k: Tensor, layout: AttentionLayout) -> None:
    """Refuse image keys and values that do not fit the layout or k."""
    shape = (layout.num_image, *k.shape[-2:])
    for name, x in (("image_k", image_k), ("image_v", image_v)):
        if x is None:
            if layout.num_image:
                raise ValueError(f"{name} is None; expected shape {shape}, since the layout lists images")
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape}, by the layout and k")
        check_like(name, x, k)
    if (image_k is None) != (image_v is None):
        missing = "image_k" if image_k is None else "image_v"
        raise ValueError(f"{missing} is None; expected a tensor, since the other of image_k and image_v is one")


def check_finishing(
    q: Tensor,
    layout: AttentionLayout,
    qk_norm: str,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Refuse norm weights and text tables that do not fit ``qk_norm`` or q."""
    check_qk_norm(qk_norm, cos)
    check_weight("q_norm_weight", q_norm_weight, q, qk_norm)
    if not layout.decoding:
        check_weight("k_norm_weight", k_norm_weight, q, qk_norm)
    elif k_norm_weight is not None:
        raise ValueError("k_norm_weight is a tensor; expected None while decoding, where keys come finished")
    check_tables("", cos, sin, layout.num_queries, q)


def check_image_tables(
    q: Tensor, layout: AttentionLayout, cos: Tensor | None, image_cos: Tensor | None, image_sin: Tensor | None
) -> None:
    """Refuse image tables while decoding, and elsewhere those that do not go with the text's."""
    if layout.decoding:
        if image_cos is not None or image_sin is not None:
            name = "image_sin" if image_cos is None else "image_cos"
            raise ValueError(f"{name} is a tensor; expected None while decoding, where keys come finished")
        return
    check_tables("image_", image_cos, image_sin, layout.num_image, q)
    if layout.num_image and (cos is None) != (image_cos is None):
        was, other = ("None", "a table") if image_cos is None else ("a table", "None")
        raise ValueError(f"image_cos is {was}; expected {other} like cos: text and image keys are rotated alike")


def check_qk_norm(qk_norm: str, cos: Tensor | None) -> None:
    """Refuse an unknown ``qk_norm``, and "pre_rope" without tables."""
    if qk_norm not in QK_NORMS:
        raise ValueError(f"qk_norm is {qk_norm!r}; expected one of {_choices(QK_NORMS)}")
    if qk_norm == "pre_rope" and cos is None:
        raise ValueError("cos is None; expected a table, since qk_norm 'pre_rope' norms before it rotates")


def check_weight(name: str, weight: Tensor | None, x: Tensor, qk_norm: str) -> None:
    """Refuse a norm weight without norm, a norm without weight, and a weight that does not fit ``x``."""
    head_dim = x.shape[-1]
    if weight is None:
        if qk_norm != "none":
            raise ValueError(f"{name} is None; expected shape ({head_dim},), since qk_norm is {qk_norm!r}")
        return
    if qk_norm == "none":
        raise ValueError(f"{name} is a tensor; expected None, since qk_norm is 'none'")
    if weight.ndim != 1 or weight.shape[0] != head_dim:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected ({head_dim},), the head dim")
    check_dtype(name, weight)
    if weight.device != x.device:
        raise ValueError(f"{name} is on {weight.device}; expected {x.device}")


def check_tables(prefix: str, cos: Tensor | None, sin: Tensor | None, rows: int, x: Tensor) -> None:
    """Refuse rotation tables that come alone, or do not fit ``rows`` tokens and the head dim and device of ``x``."""
    if (cos is None) != (sin is None):
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise ValueError(f"{prefix}{missing} is None while {prefix}{given} is not; expected both tables or neither")
    head_dim = x.shape[-1]
    for name, table in ((f"{prefix}cos", cos), (f"{prefix}sin", sin)):
        if table is None:
            continue
        if head_dim % 2:
            raise ValueError(f"{name} is a table; expected None, since the head dim {head_dim} is odd")
        if table.ndim != 2 or table.shape[0] != rows or table.shape[1] not in (head_dim, head_dim // 2):
            form = f"({rows}, {head_dim}) or its first half ({rows}, {head_dim // 2})"
            raise ValueError(f"{name} has shape {tuple(table.shape)}; expected {form}")
        dtypes = DTYPES if table.shape[1] == head_dim else (torch.float32, torch.float64)
        check_dtype(name, table, dtypes)
        if table.device != x.device:
            raise ValueError(f"{name} is on {table.device}; expected {x.device}")


def _choices(names: tuple[object, ...]) -> str:
    return ", ".join(str(name) if isinstance(name, torch.dtype) else repr(name) for name in names)
