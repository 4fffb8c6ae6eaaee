"""Where text looks: the probability of each text token on each patch of each image, at every routed layer.

Queries and keys are captured as a layer's projections make them while the model runs as always. The probabilities come
from them and from the normaliser that the attention op returns for them, so they sum to 1 only if the arithmetic is
the op's. Axes: T text token, N image token, H query head, G key/value head, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hive_ds.errors import HiveError
from hive_ds.kernels import finish_keys, hierarchical_attention
from hive_ds.model.attention import AttentionCall, HiveAttention
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.inputs import PromptImages
from hive_ds.processing import HiveProcessor, ImageInput


@dataclass(frozen=True)
class LayerMaps:
    """Attention of one LLM layer: probabilities on the CPU, one row for each text token.

    Over both sources of keys together a row sums to 1. The row of token t says where the model looked to predict token
    t + 1.

    Attributes:
        layer: index in the LLM, from 0.
        blocks: vision blocks that the layer reads, in route order; empty where images are tokens of the text.
        text_TT: (T, T) on text tokens.
        images: of each image (T, blocks, rows, columns) on its patches, zero before the image's media offset; one
            block's share where the layer reads several, and a single one where ``blocks`` is empty.
    """

    layer: int
    blocks: tuple[int, ...]
    text_TT: Tensor
    images: list[Tensor]

    def on_patches(self, image: int) -> Tensor:
        """(T, rows, columns) on the patches of one image, all blocks together."""
        return self.images[image].sum(dim=1)


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of one text at every layer that sees images."""

    tokens: list[int]
    """Ids of the text tokens, placeholders left out."""
    layers: list[LayerMaps]


def attention_maps(
    model: HiveForCausalLM,
    processor: HiveProcessor,
    text: str,
    images: ImageInput | Sequence[ImageInput],
    *,
    head: int | None = None,
) -> AttentionMaps:
    """Attention of ``text`` (prompt and answer), whose ``<image>`` placeholders stand for ``images``.

    Args:
        model: in eval mode.
        processor: its own.
        text: plain, or rendered by the chat template.
        images: as `HiveProcessor` takes them.
        head: one query head; None is the mean over heads.

    Raises:
        HiveError: placeholders and images differ in number, there is no image, or no such head.
    """
    inputs = processor(text, images).to(model.device, model.dtype)
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    offsets = pixels.pop("image_offsets")
    encoded = model.encode_prompt_images(image_offsets=offsets, prompts=1, **{"pixel_values": None, **pixels})
    return token_attention_maps(model, inputs["input_ids"], encoded, head=head)


@torch.no_grad()
def token_attention_maps(
    model: HiveForCausalLM, input_ids: Tensor, images: PromptImages, *, head: int | None = None
) -> AttentionMaps:
    """`attention_maps` of tokens (1, T) without placeholders and images that are encoded already."""
    heads = model.config.text_config.num_attention_heads
    if head is not None and not 0 <= head < heads:
        raise HiveError(f"attention head {head}: expected 0 to {heads - 1}, or none for the mean over heads")
    if images.is_empty:
        raise HiveError("attention map of a text without an image: expected at least one <image>")
    with _capture(model) as captured:
        model(input_ids, prompt_images=images, logits_to_keep=1)
    layers = [_layer_maps(one, model.routes.blocks_by_layer[one.attention.layer], images, head) for one in captured]
    return AttentionMaps(input_ids[0].tolist(), layers)


@dataclass
class _Captured:
    """What one routed layer's attention was called with, and what its projections made of it."""

    attention: HiveAttention
    call: AttentionCall | None = None
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    """Of the text, then of the images: both through k_proj, or the images' through image_k_proj."""


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
    norm = None if attention.qk_norm == "none" else (attention.q_norm, attention.k_norm)
    weights = (None, None) if norm is None else (norm[0].weight, norm[1].weight)
    eps = 1e-6 if norm is None else norm[0].variance_epsilon
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
