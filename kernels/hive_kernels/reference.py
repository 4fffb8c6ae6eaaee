"""Hierarchical attention in plain PyTorch, one sample at a time: what the method says in words, and nothing faster."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import AttentionLayout


def reference_attention(
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
    """Joint softmax of text queries over text and image keys, queries and keys already normed and rotated.

    Shapes as in `hierarchical_attention`. Computed in fp32 (fp64 for fp64).

    Returns:
        out (rows of q, H, K) in the dtype of q, and lse (rows of q, H): the natural log of the sum of exponentials of
        the scaled scores, None unless asked for.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group_size = q.shape[1] // k.shape[-2]
    outs = [q.new_empty(0, *q.shape[1:], dtype=wide)]
    lses = [q.new_empty(0, q.shape[1], dtype=wide)]
    first_query = first_text = 0
    for b in range(layout.num_samples):
        text, queries = layout.text_lengths[b], layout.query_lengths[b]
        text_rows = slice(first_text, first_text + text)
        keys_SGK = k[text_rows] if k.ndim == 3 else k[b, :text]
        values_SGK = v[text_rows] if v.ndim == 3 else v[b, :text]
        position = torch.arange(text - queries, text, device=q.device)
        visible = torch.arange(text, device=q.device) <= position[:, None]  # token t sees tokens s <= t
        image_row = layout.image_starts[b]
        for length, offset in zip(layout.image_lengths[b], layout.image_offsets[b], strict=True):
            assert image_k is not None
            assert image_v is not None
            keys_SGK = torch.cat([keys_SGK, image_k[image_row : image_row + length]])
            values_SGK = torch.cat([values_SGK, image_v[image_row : image_row + length]])
            seen = (position >= offset)[:, None].expand(-1, length)  # and all patches of an image with offset <= t
            visible = torch.cat([visible, seen], dim=1)
            image_row += length
        query_THK = q[first_query : first_query + queries].to(wide)
        keys_SHK = keys_SGK.to(wide).repeat_interleave(group_size, dim=1)  # query head h reads group h // (H/G)
        values_SHK = values_SGK.to(wide).repeat_interleave(group_size, dim=1)
        scores_HTS = torch.einsum("thk,shk->hts", query_THK, keys_SHK) * softmax_scale
        scores_HTS = scores_HTS.masked_fill(~visible, float("-inf"))
        lse_HT = torch.logsumexp(scores_HTS, dim=-1)
        probabilities_HTS = torch.exp(scores_HTS - lse_HT[:, :, None])
        outs.append(torch.einsum("hts,shk->thk", probabilities_HTS, values_SHK))
        lses.append(lse_HT.T)
        first_query += queries
        first_text += text
    return torch.cat(outs).to(q.dtype), torch.cat(lses) if return_lse else None
