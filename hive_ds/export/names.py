"""Names of the same weights in transformers, timm and open_clip: tables of patterns, over canonical names.

Canonical names are those of `hive_ds.model.identity`. A target such as ``attn.qkv.weight[0]`` is part 0 of a tensor
that is put together from several.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from hive_ds.errors import HiveError
from hive_ds.model.identity import canonical_parts

Table = tuple[tuple[str, str], ...]
DROP = ""
"""Target of weights that the other library has no place for and that no feature depends on."""

_TIMM_CLIP_BLOCK: Table = (
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(.+)", r"blocks.\1.attn.qkv.\2[0]"),
    (r"encoder\.layers\.(\d+)\.self_attn\.k_proj\.(.+)", r"blocks.\1.attn.qkv.\2[1]"),
    (r"encoder\.layers\.(\d+)\.self_attn\.v_proj\.(.+)", r"blocks.\1.attn.qkv.\2[2]"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.(.+)", r"blocks.\1.mlp.\2"),
    (r"embeddings\.patch_embedding\.(.+)", r"patch_embed.proj.\1"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"post_layernorm\.(.+)", r"norm.\1"),
)
TIMM_SIGLIP: Table = (
    *_TIMM_CLIP_BLOCK,
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.in_proj_(.+)", r"attn_pool.in_proj.\1"),
    (r"head\.attention\.out_proj\.(.+)", r"attn_pool.proj.\1"),
    (r"head\.layernorm\.(.+)", r"attn_pool.norm.\1"),
    (r"head\.mlp\.(.+)", r"attn_pool.mlp.\1"),
)
TIMM_CLIP: Table = (
    *_TIMM_CLIP_BLOCK,
    (r"embeddings\.class_embedding", "cls_token"),
    (r"pre_layrnorm\.(.+)", r"norm_pre.\1"),
)
TIMM_DINOV2: Table = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.mask_token", DROP),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.norm([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.q_proj\.(.+)", r"blocks.\1.attn.qkv.\2[0]"),
    (r"encoder\.layer\.(\d+)\.attention\.k_proj\.(.+)", r"blocks.\1.attn.qkv.\2[1]"),
    (r"encoder\.layer\.(\d+)\.attention\.v_proj\.(.+)", r"blocks.\1.attn.qkv.\2[2]"),
    (r"encoder\.layer\.(\d+)\.attention\.o_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.(fc[12]\..+)", r"blocks.\1.mlp.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.gate_proj\.(.+)", r"blocks.\1.mlp.fc1.\2[0]"),
    (r"encoder\.layer\.(\d+)\.mlp\.up_proj\.(.+)", r"blocks.\1.mlp.fc1.\2[1]"),
    (r"encoder\.layer\.(\d+)\.mlp\.down_proj\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.(.+)", r"norm.\1"),
)
OPEN_CLIP: Table = (
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.patch_embedding\.weight", "conv1.weight"),
    (r"pre_layrnorm\.(.+)", r"ln_pre.\1"),
    (r"post_layernorm\.(.+)", r"ln_post.\1"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(.+)", r"transformer.resblocks.\1.ln_\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(.+)", r"transformer.resblocks.\1.attn.in_proj_\2[0]"),
    (r"encoder\.layers\.(\d+)\.self_attn\.k_proj\.(.+)", r"transformer.resblocks.\1.attn.in_proj_\2[1]"),
    (r"encoder\.layers\.(\d+)\.self_attn\.v_proj\.(.+)", r"transformer.resblocks.\1.attn.in_proj_\2[2]"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.+)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(.+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(.+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
)


def rename(weights: Iterable[tuple[str, Tensor]], table: Table) -> dict[str, Tensor]:
    """A tower's weights under the names of ``table``.

    Raises:
        HiveError: names that no pattern matches; all are listed.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    strays = []
    for own_name, own_tensor in weights:
        for name, tensor in canonical_parts(own_name, own_tensor):
            target = _target(name, table)
            if target is None:
                strays.append(name)
            elif match := re.fullmatch(r"(.+)\[(\d)\]", target):
                parts.setdefault(match[1], {})[int(match[2])] = tensor
            elif target != DROP:
                renamed[target] = tensor.contiguous()
    if strays:
        raise HiveError(f"weights without a place in the other library: {', '.join(strays)}")
    return renamed | {name: torch.cat([tensors[part] for part in sorted(tensors)]) for name, tensors in parts.items()}


def _target(name: str, table: Table) -> str | None:
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None
