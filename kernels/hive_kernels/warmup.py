"""Compiling every kernel that a model needs before its first step, once for all ranks of a node."""

from __future__ import annotations

import fcntl
import time

import torch

from .kernel_cache import use_local_cache
from .layout import AttentionLayout
from .op import hierarchical_attention
from .tiles import SHORT_ROWS

PROMPT = 17
"""Tokens, more than the rows of any tile for decoding."""


def warm_up(
    *,
    heads: int,
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    qk_norm: str = "none",
    rotate: bool = True,
    decoding: bool = False,
) -> float:
    """Run attention of a model's shape on tiny batches of each sort: what is compiled then serves all lengths.

    Call it once a process before step 1: a compilation inside a step looks like a hang to the other ranks. The first
    process of a node compiles, the others wait for it and load what it made.

    Args:
        heads: query heads (H).
        groups: key/value heads (G).
        head_dim: K.
        dtype: of q, k and v.
        device: a GPU.
        qk_norm: as in `hierarchical_attention`.
        rotate: whether rotation tables are given.
        decoding: also compile a step of one token, on a padded cache and on packed keys, and a prompt on a cache.

    Returns:
        Seconds it took.

    Raises:
        ValueError: what `hierarchical_attention` with backend "triton" refuses.
    """
    began = time.monotonic()
    with (use_local_cache() / "warm-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, even by a crash
        for rows in (1, SHORT_ROWS // 4 + 1, SHORT_ROWS // 2 + 1, SHORT_ROWS + groups * heads):
            tokens = -(-rows * groups // heads)
            _attend(tokens, heads, groups, head_dim, dtype, device, qk_norm, rotate)
        if decoding:
            for tokens, padded in ((1, True), (1, False), (PROMPT, True)):
                _decode(tokens, padded, heads, groups, head_dim, dtype, device, qk_norm, rotate)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    return time.monotonic() - began


def _attend(
    tokens: int,
    heads: int,
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    qk_norm: str,
    rotate: bool,
) -> None:
    layout = AttentionLayout.build([tokens], [[2]], [[0]], device=device)

    def zeros(*shape: int, dtype: torch.dtype = dtype, gradient: bool = True) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device, requires_grad=gradient)

    def table(rows: int) -> torch.Tensor | None:
        return zeros(rows, head_dim // 2, dtype=torch.float32, gradient=False) if rotate else None

    weights = [None if qk_norm == "none" else zeros(head_dim) for _ in "qk"]
    out = hierarchical_attention(
        zeros(tokens, heads, head_dim),
        zeros(tokens, groups, head_dim),
        zeros(tokens, groups, head_dim),
        zeros(2, groups, head_dim),
        zeros(2, groups, head_dim),
        layout,
        q_norm_weight=weights[0],
        k_norm_weight=weights[1],
        qk_norm=qk_norm,
        cos=table(tokens),
        sin=table(tokens),
        image_cos=table(2),
        image_sin=table(2),
        backend="triton",
    )
    assert isinstance(out, torch.Tensor)
    out.sum().backward()


def _decode(
    tokens: int,
    padded: bool,
    heads: int,
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    qk_norm: str,
    rotate: bool,
) -> None:
    layout = AttentionLayout.build([tokens + 1], [[2]], [[0]], [tokens], device=device)
    shape = (1, tokens + 3) if padded else (tokens + 1,)
    keys, image_keys = (torch.zeros(*x, groups, head_dim, dtype=dtype, device=device) for x in (shape, (2,)))
    table = torch.zeros(tokens, head_dim // 2, device=device) if rotate else None
    with torch.no_grad():
        hierarchical_attention(
            torch.zeros(tokens, heads, head_dim, dtype=dtype, device=device),
            keys,
            keys,
            image_keys,
            image_keys,
            layout,
            q_norm_weight=None if qk_norm == "none" else torch.ones(head_dim, dtype=dtype, device=device),
            qk_norm=qk_norm,
            cos=table,
            sin=table,
            backend="triton",
        )
