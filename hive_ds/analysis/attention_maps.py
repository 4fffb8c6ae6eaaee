"""Where text looks, straight from a model, its processor, pictures and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hive_ds.analysis.cascaded_maps import cascaded_layer_maps
from hive_ds.analysis.hive_maps import hive_layer_maps
from hive_ds.analysis.maps import AttentionMaps
from hive_ds.errors import HiveError
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.processing import HiveProcessor, ImageInput


def attention_maps(
    model: TrainedModel,
    processor: HiveProcessor,
    text: str,
    images: ImageInput | Sequence[ImageInput],
    *,
    head: int | None = None,
) -> AttentionMaps:
    """Attention of ``text`` (prompt and answer), whose ``<image>`` placeholders stand for ``images``.

    Args:
        model: HIVE's, whose routed layers are looked at, or a cascaded one, of which all are; in eval mode.
        processor: its own.
        text: plain, or rendered by the chat template.
        images: as `HiveProcessor` takes them.
        head: one query head; None is the mean over heads.

    Raises:
        HiveError: placeholders and images differ in number, there is no image, or no such head.
    """
    inputs = dict(processor(text, images).to(model.device, model.dtype))
    input_ids, _, (offsets,) = (inputs.pop(name) for name in ("input_ids", "attention_mask", "image_offsets"))
    return token_attention_maps(model, input_ids, offsets, inputs, head=head)


@torch.no_grad()
def token_attention_maps(
    model: TrainedModel,
    input_ids: Tensor,
    image_offsets: Sequence[int],
    pixels: Mapping[str, Tensor],
    *,
    head: int | None = None,
) -> AttentionMaps:
    """`attention_maps` of tokens.

    Args:
        model: as there.
        input_ids: (1, T), placeholders left out.
        image_offsets: media offset of each image, ascending.
        pixels: ``pixel_values`` and what else the image processor returns.
        head: as there.

    Raises:
        HiveError: as there.
    """
    heads = model.config.text_config.num_attention_heads
    if head is not None and not 0 <= head < heads:
        raise HiveError(f"attention head {head}: expected 0 to {heads - 1}, or none for the mean over heads")
    if not image_offsets:
        raise HiveError("attention map of a text without an image: expected at least one <image>")
    if isinstance(model, HiveForCausalLM):
        layers = hive_layer_maps(model, input_ids, image_offsets, pixels, head)
    else:
        layers = cascaded_layer_maps(model, input_ids, image_offsets, pixels, head)
    return AttentionMaps(input_ids[0].tolist(), layers)
