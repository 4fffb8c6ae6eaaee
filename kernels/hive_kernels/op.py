"""The public call: checks every argument, finishes queries and keys, hands over to a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import choose_backend
from .checks import (
    check_backend,
    check_finishing,
    check_image_tables,
    check_images,
    check_number,
    check_text,
)
from .dense import dense_attention
from .finish import finish
from .fused import fused_attention
from .layout import AttentionLayout
from .reference import reference_attention


def hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    layout: AttentionLayout,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    qk_norm: str = "none",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    image_cos: Tensor | None = None,
    image_sin: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Text queries attend to the text before them and to the images before them, in one softmax (arXiv 2604.00086).

    Args:
        q: (T, H, K) queries of all samples end to end, bf16, fp16, fp32 or fp64; while decoding, of each sample's last
            ``query_lengths[b]`` tokens only.
        k: (T, G, K) keys in q's dtype, H a multiple of G; query head h reads head h // (H/G). While decoding, finished
            keys (`finish_keys`), packed or as a cache (B, S, G, K) whose line b starts with sample b's
            ``text_lengths[b]`` rows; what comes after them is never read.
        v: like k.
        image_k: (N, G, K) image keys in the layout's order, finished while decoding; None only if it lists no image.
        image_v: like image_k.
        layout: who sees what; built once a batch.
        q_norm_weight: (K,) RMSNorm weight of the queries; None exactly where ``qk_norm`` is "none".
        k_norm_weight: (K,) RMSNorm weight of text and image keys; None while decoding.
        norm_eps: added to the mean square.
        qk_norm: "none", "pre_rope" or "post_rope".
        cos: (rows of q, K), or its first half (rows, K/2) in fp32: rotation of q and k. None: already rotated.
        sin: like cos.
        image_cos: (N, K) or (N, K/2), with ``cos`` or not at all; None while decoding.
        image_sin: like image_cos.
        softmax_scale: factor on the scores; K ** -0.5 if None.
        backend: "auto": "triton" on a GPU wherever it can serve, "sdpa" elsewhere. "triton": fused, for GPUs; no fp64,
            odd head dim or one above 256, no gradients while decoding. "sdpa": torch's attention over samples padded
            into one rectangle. "reference": slow and plain.
        return_lse: also return the log of the sum of exponentials of the scaled scores.

    Returns:
        out (rows of q, H, K) in q's dtype; with ``return_lse``, (out, lse) with lse (rows of q, H) in fp32 (fp64 for
        fp64). Every given tensor gets a gradient; that of an image which no token sees is exactly zero.

    Raises:
        ValueError: names the argument, what it was, and what it must be.
    """
    check_backend(backend)
    check_text(q, k, v, layout)
    check_images(image_k, image_v, k, layout)
    check_finishing(q, layout, qk_norm, q_norm_weight, k_norm_weight, cos, sin)
    check_image_tables(q, layout, cos, image_cos, image_sin)
    check_number("norm_eps", norm_eps, low=0)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else check_number("softmax_scale", softmax_scale)

    backend, _ = choose_backend(
        backend,
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        decoding=layout.decoding,
        gradient=torch.is_grad_enabled() and _needs_gradient(q, k, v, image_k, image_v, q_norm_weight),
    )
    out: Tensor
    lse: Tensor | None
    if backend == "triton":
        out, lse = fused_attention(
            q, k, v, image_k, image_v, layout, scale, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight,
            norm_eps=norm_eps, qk_norm=qk_norm, cos=cos, sin=sin, image_cos=image_cos, image_sin=image_sin,
        )  # fmt: skip
    else:
        q = finish(q, q_norm_weight, norm_eps, qk_norm, cos, sin)
        if not layout.decoding:
            k = finish(k, k_norm_weight, norm_eps, qk_norm, cos, sin)
            if image_k is not None:
                image_k = finish(image_k, k_norm_weight, norm_eps, qk_norm, image_cos, image_sin)
        # Seen by no query, and yet their gradient is zeros.
        unread = [] if layout.max_seen else [image_k, image_v]
        q = _tie(q, *unread, *([] if layout.num_queries else [k, v]))
        if layout.num_queries:
            attend = reference_attention if backend == "reference" else dense_attention
            out, lse = attend(q, k, v, image_k, image_v, layout, scale, return_lse=return_lse)
        else:
            out, lse = q, q.to(torch.promote_types(q.dtype, torch.float32)).sum(-1)
    return (out, lse) if return_lse and lse is not None else out


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


def _tie(q: Tensor, *unread: Tensor | None) -> Tensor:
    """``q``, through which the tensors that no query reads get a gradient of exact zeros instead of None.

    The sum of no rows is a zero that depends on the tensor but on none of its values.
    """
    for x in unread:
        if x is not None and x.requires_grad:
            q = q + x[:0].sum()
    return q
