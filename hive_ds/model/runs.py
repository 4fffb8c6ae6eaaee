"""The pieces of HIVE that torch.compile takes as one: a run of LLM layers, and what makes a layer's image states.

Every piece costs the host as much as some ten launches, forward and backward.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from hive_ds.model.attention import AttentionCall

MOST_LAYERS = 5
"""Layers of a run, at most. The paper's routes end runs of five, all alike: they share what is compiled."""


def split_runs(num_layers: int, routed: Container[int]) -> list[range]:
    """All layers in order; a run ends with a routed one, or is full."""
    runs, first = [], 0
    for index in range(num_layers):
        if index in routed or index + 1 - first == MOST_LAYERS or index + 1 == num_layers:
            runs.append(range(first, index + 1))
            first = index + 1
    return runs


def run_layers(layers: Sequence[Any], hidden: Tensor, calls: Sequence[AttentionCall]) -> Tensor:
    """Hidden states (1, T, D) through some layers of an LLM, each with its own call."""
    for layer, call in zip(layers, calls, strict=True):
        output = layer(hidden, hive=call)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def image_states(projectors: Sequence[Any], norm: Any, features: Sequence[Tensor], interleave: Tensor | None) -> Tensor:
    """Projected and normed features (N, D) that a layer makes image keys of.

    Args:
        projectors: one for each of its blocks.
        norm: the layer's.
        features: of each block, of all images.
        interleave: order that puts the blocks of an image beside each other, or None for one block.
    """
    projected = [projector(one) for projector, one in zip(projectors, features, strict=True)]
    return norm(projected[0] if interleave is None else torch.cat(projected)[interleave])
