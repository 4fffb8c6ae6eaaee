"""Attention maps: the probability of each text token on each patch of each image, layer by layer. T: text token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
