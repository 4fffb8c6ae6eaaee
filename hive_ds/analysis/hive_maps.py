"""Attention maps of a HIVE model, at its routed layers.

Queries and keys are captured as a layer's projections make them while the model runs as always. The probabilities come
from them and from the normaliser that the attention op returns for them, so they sum to 1 only if the arithmetic is
the op's. Axes: T text token, N image token, H query head, G key/value head, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hive_ds.analysis.maps import LayerMaps
from hive_ds.kernels import finish_keys, hierarchical_attention
from hive_ds.model.attention import AttentionCall, HiveAttention
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.inputs import PromptImages


def hive_layer_maps(
    model: HiveForCausalLM, input_ids: Tensor, offsets: Sequence[int], pixels: Mapping[str, Tensor], head: int | None
) -> list[LayerMaps]:
    """Maps of one text; arguments as in `hive_ds.analysis.attention_maps.token_attention_maps`."""
    # What is compiled would be compiled anew, for one text: without gradients, and for hooks inside of it.
    with torch.compiler.set_stance("force_eager"):
        images = model.encode_prompt_images(image_offsets=[offsets], prompts=1, **pixels)
        with _capture(model) as captured:
            model(input_ids, prompt_images=images, logits_to_keep=1)
    return [_layer_maps(one, model.routes.blocks_by_layer[one.attention.layer], images, head) for one in captured]


@dataclass
class _Captured:
    """What one routed layer's attention was called with, and what its projections made of it."""

    attention: HiveAttention
    call: AttentionCall | None = None
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    """Of the text, then of the images: both through k_proj, or the images' through image_k_proj."""
    norm_weights: tuple[Tensor | None, Tensor | None] = (None, None)
    """Of q and k. Copies: between the calls of a layer ZeRO-3 keeps but a part of each weight."""


@contextmanager
def _capture(model: HiveForCausalLM) -> Iterator[list[_Captured]]:
    """Fill one `_Captured` for each routed layer, in order, while the model runs inside."""
    found = [_Captured(module) for module in model.modules() if isinstance(module, HiveAttention) and module.routed]
    found.sort(key=lambda one: one.attention.layer)
    with ExitStack() as stack:
        for one in found:
            for hook in _hooks(one):
                stack.callback(hook.remove)
        yield found


def _hooks(one: _Captured) -> list[torch.utils.hooks.RemovableHandle]:
    def keep_call(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        one.call = keywords["hive"]
        if one.attention.qk_norm != "none":
            one.norm_weights = (one.attention.q_norm.weight.clone(), one.attention.k_norm.weight.clone())

    def keep(outputs: list[Tensor]):  # type: ignore[no-untyped-def]
        return lambda module, arguments, output: outputs.append(output)

    attention = one.attention
    hooks = [
        attention.register_forward_pre_hook(keep_call, with_kwargs=True),
        attention.q_proj.register_forward_hook(keep(one.queries)),
        attention.k_proj.register_forward_hook(keep(one.keys)),
    ]
    if hasattr(attention, "image_k_proj"):
        hooks.append(attention.image_k_proj.register_forward_hook(keep(one.keys)))
    return hooks


def _layer_maps(one: _Captured, blocks: tuple[int, ...], images: PromptImages, head: int | None) -> LayerMaps:
    """Probabilities of one layer, on text keys and on image keys."""
    text_TT, image_TN = _probabilities(one, head)
    maps, first = [], 0
    for (rows, columns), offset in zip(images.grids[0], images.offsets[0], strict=True):
        keys = len(blocks) * rows * columns
        seen = image_TN[:, first : first + keys].unflatten(1, (len(blocks), rows, columns))
        seen[:offset] = 0  # not by a factor: what is not visible may be infinite
        maps.append(seen.cpu())
        first += keys
    return LayerMaps(one.attention.layer, blocks, text_TT.tril().cpu(), maps)


def _probabilities(one: _Captured, head: int | None) -> tuple[Tensor, Tensor]:
    """(T, T) and (T, N) exponentials of scores minus the op's normaliser; what is not visible is not zeroed yet.

    Computed in fp32 (fp64 for fp64), whatever the model's dtype.
    """
    attention, call = one.attention, one.call
    assert call is not None
    (query,), (key, image_key) = one.queries, one.keys
    q, k, image_k = (_heads(x, attention.head_dim) for x in (query, key, image_key))
    weights = one.norm_weights
    eps = 1e-6 if attention.qk_norm == "none" else attention.q_norm.variance_epsilon
    # Values do not matter for the normaliser: the keys stand in for them.
    _, lse_TH = hierarchical_attention(
        q, k, k, image_k, image_k, call.layout,
        q_norm_weight=weights[0], k_norm_weight=weights[1], norm_eps=eps, qk_norm=attention.qk_norm,
        cos=call.cos_TK, sin=call.sin_TK, image_cos=call.image_cos_NK, image_sin=call.image_sin_NK,
        softmax_scale=attention.softmax_scale, backend=attention.backend, return_lse=True,
    )  # fmt: skip
    q = finish_keys(q, weights[0], eps, attention.qk_norm, call.cos_TK, call.sin_TK) * attention.softmax_scale
    k = finish_keys(k, weights[1], eps, attention.qk_norm, call.cos_TK, call.sin_TK)
    image_k = finish_keys(image_k, weights[1], eps, attention.qk_norm, call.image_cos_NK, call.image_sin_NK)
    return _exponentials(q, k, lse_TH, head), _exponentials(q, image_k, lse_TH, head)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, head_dim))


def _exponentials(q_THK: Tensor, k_SGK: Tensor, lse_TH: Tensor, head: int | None) -> Tensor:
    """(T, S) exp(score - lse) of one head, or the mean over heads."""
    heads = range(q_THK.shape[1]) if head is None else [head]
    group_size = q_THK.shape[1] // k_SGK.shape[1]
    total = q_THK.new_zeros(len(q_THK), len(k_SGK))
    for h in heads:  # one at a time: (H, T, S) at once would be large for long texts
        total += torch.exp(q_THK[:, h] @ k_SGK[:, h // group_size].T - lse_TH[:, h, None])
    return total / len(heads)
