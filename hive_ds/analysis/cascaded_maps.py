"""Attention maps of a cascaded model: text tokens on the image tokens that stand before them, at every layer.

The model runs once with the LLM's own plain ("eager") attention, which returns its probabilities.
Axes: T text token, N patch of all images, S place in the sequence, H head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hive_ds.analysis.maps import LayerMaps
from hive_ds.model.cascaded import CascadedForCausalLM
from hive_ds.model.interleaving import Interleaving
from hive_ds.model.vision import encode_images


def cascaded_layer_maps(
    model: CascadedForCausalLM,
    input_ids: Tensor,
    offsets: Sequence[int],
    pixels: Mapping[str, Tensor],
    head: int | None,
) -> list[LayerMaps]:
    """Maps of one text; arguments as in `hive_ds.analysis.attention_maps.token_attention_maps`."""
    length = input_ids.shape[1]
    grids = encode_images(model.vision_encoder, model.feature_blocks, **pixels).grids
    patches = [rows * columns for rows, columns in grids]
    places = Interleaving.build([length], [patches], [offsets], keep_last=False)
    with _attentions(model.language_model) as found:
        model(input_ids, image_offsets=[offsets], **pixels)
    maps = []
    for layer, weights_HSS in enumerate(found):
        weights_SS = weights_HSS.float().mean(0) if head is None else weights_HSS[head].float()
        weights_TS = weights_SS[places.text_T]
        by_source = weights_TS.new_zeros(length, length + sum(patches))
        by_source[:, places.source_S] = weights_TS
        text_TT, *images = by_source.cpu().split([length, *patches], dim=1)
        shaped = [image.unflatten(1, (1, *grid)) for image, grid in zip(images, grids, strict=True)]
        maps.append(LayerMaps(layer, (), text_TT, shaped))
    return maps


@contextmanager
def _attentions(language_model: Any) -> Iterator[list[Tensor]]:
    """Probabilities (H, S, S) of every layer in the one forward pass inside."""
    found: list[Tensor] = []

    def ask(module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        return arguments, {**keywords, "output_attentions": True}

    def keep(module: nn.Module, arguments: tuple, output: Any) -> None:
        found.extend(layer[0] for layer in output.attentions)

    usual = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    hooks = [
        language_model.register_forward_pre_hook(ask, with_kwargs=True),
        language_model.register_forward_hook(keep),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        language_model.set_attn_implementation(usual)
