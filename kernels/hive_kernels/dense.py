"""The batched path: samples in one rectangle, whole texts on CPUs in a few; no loop over tokens or samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .copies import rows_in_memory
from .layout import AttentionLayout
from .padded_op import padded_attention
from .rectangle_op import attend

IN_PLACE_ELEMENTS = 2**18
"""From so many elements of joined keys on, a step of one token reads cache and image keys where they lie instead.

Measured on one core (fp32 and bf16, head dims 64 and 128): at 3 million elements it takes less than half the time of
joining them; at small sizes, and with more queries a sample, joining them for the fused kernel is faster.
"""


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    layout: AttentionLayout,
    softmax_scale: float,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`reference_attention`, batched. The layout has at least one query; lse is None unless asked for."""
    if q.device.type == "cpu" and not (return_lse or layout.decoding or layout.shares_images):
        return _in_rectangles(q, k, v, image_k, image_v, layout, softmax_scale), None
    queries_BTHK = layout.query_rows.pad(q)
    keys, values = _text_pieces(k, layout), _text_pieces(v, layout)
    if layout.max_seen and image_k is not None and image_v is not None:
        keys.append(layout.image_rows.pad(image_k))
        values.append(layout.image_rows.pad(image_v))
    if return_lse or (k.ndim == 4 and _better_in_place(keys, layout)):
        out, lse = _explicit(queries_BTHK, keys, values, layout, softmax_scale)
        return layout.query_rows.unpad(out).to(q.dtype), layout.query_rows.unpad(lse) if return_lse else None
    out = _fused(queries_BTHK, _join(keys, layout), _join(values, layout), layout, softmax_scale)
    return layout.query_rows.unpad(out), None


def _in_rectangles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    layout: AttentionLayout,
    scale: float,
) -> Tensor:
    """Whole texts on a CPU: samples of about one length share a rectangle, and one op computes all of them."""
    rectangles = layout.rectangles
    images = (image_k, image_v) if layout.max_seen else (None, None)
    keys, values = (rectangles.join(x, image) for x, image in zip((k, v), images, strict=True))
    mask = rectangles.mask(layout, q.dtype)
    out, _ = attend(rectangles.pad(q), keys, values, mask, rectangles.shape, scale, layout.schedule.pairs)
    return rectangles.unpad(out)


def _better_in_place(keys: list[Tensor], layout: AttentionLayout) -> bool:
    """Whether joining the pieces for the fused kernel would cost more than it saves. On a GPU, launches cost more."""
    if len(keys) == 1 or layout.max_queries > 1 or keys[0].is_cuda:
        return False
    rows = layout.num_samples * sum(piece.shape[1] for piece in keys)
    return rows * keys[0][0, 0].numel() >= IN_PLACE_ELEMENTS


def _text_pieces(x: Tensor, layout: AttentionLayout) -> list[Tensor]:
    """Text keys or values as rectangles (B, rows, G, K) that together hold max_text rows, without garbage.

    Of a padded cache, the rows that every sample has are a view. Only the ragged tail is copied, to put zeros over rows
    past a sample's length: a weight of 0 does not hide a NaN.
    """
    if x.ndim == 3:
        return [layout.text_rows.pad(x)]
    pieces = [x[:, : layout.min_text]] if layout.min_text else []
    if layout.max_text > layout.min_text:
        pieces.append(x[:, layout.min_text : layout.max_text].masked_fill(layout.stale_rows, 0))
    return pieces


def _join(pieces: list[Tensor], layout: AttentionLayout) -> Tensor:
    """All keys or values of each sample, (B, rows, G, K)."""
    if len(pieces) == 1:
        return pieces[0]
    count = layout.num_samples
    return torch.cat(
        [piece.repeat_interleave(count // len(piece), dim=0) if len(piece) != count else piece for piece in pieces],
        dim=1,
    )


def _fused(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    causal = layout.is_causal
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu":
        # The CPU flash kernel reads grouped heads as they are: 1.1 to 1.4 times as fast as repeating them, forward and
        # backward together (fp32 and bf16, groups of 3, 4 and 7, one core).
        q, k, v = (rows_in_memory(x) for x in (q, k, v))
        added = None if causal else _additive_mask(layout, q.dtype)
        return padded_attention(q, k, v, added, causal, scale, layout.schedule.pairs)[0].transpose(1, 2)
    mask = None if causal else layout.mask
    if grouped and mask is not None:
        # With a mask no fused CUDA backend reads grouped heads; spelled out they are spared the unfused one.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _additive_mask(layout: AttentionLayout, dtype: torch.dtype) -> Tensor | None:
    """0 where a query sees a key, else -inf."""
    mask = layout.mask
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _explicit(
    q_BTHK: Tensor, keys: list[Tensor], values: list[Tensor], layout: AttentionLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax written out over keys that stay in pieces: out (B, T, H, K), lse (B, T, H), fp32 (fp64 for fp64).

    One key/value head at a time: its slice of a cache (B, S, G, K) is a strided batch that bmm reads in place, while
    all heads at once would be copied. A piece may have fewer lines than the batch has samples: neighbours share a line.
    """
    count, tokens, heads, head_dim = q_BTHK.shape
    groups = keys[0].shape[2]
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    q_BTGPK = q_BTHK.unflatten(2, (groups, heads // groups)).to(wide) * scale
    widths = [piece.shape[1] for piece in keys]
    mask = layout.mask
    outs, lses = [], []
    for group in range(groups):
        rows = q_BTGPK[:, :, group].reshape(count, -1, head_dim)
        scores = torch.cat([_share(rows, piece[:, :, group].to(wide).transpose(1, 2)) for piece in keys], dim=-1)
        if mask is not None:
            seen = mask.transpose(1, 2)  # (B, T, 1, S): the heads of a token see alike
            scores = scores.unflatten(1, (tokens, -1)).masked_fill(~seen, float("-inf")).flatten(1, 2)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse[:, :, None]).split(widths, dim=-1)
        parts = [_share(w, piece[:, :, group].to(wide)) for w, piece in zip(weights, values, strict=True)]
        outs.append(sum(parts[1:], parts[0]).unflatten(1, (tokens, -1)))
        lses.append(lse.unflatten(1, (tokens, -1)))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _share(rows: Tensor, line: Tensor) -> Tensor:
    """(B, r, a) @ (U, a, c) -> (B, r, c), each line of the second serving B / U neighbours of the first."""
    return (rows.reshape(len(line), -1, rows.shape[-1]) @ line).reshape(len(rows), -1, line.shape[-1])
