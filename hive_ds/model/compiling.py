"""torch.compile on the parts of a model that repeat, in a way that new lengths do not compile anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hive_ds.model.attention import HiveAttention
from hive_ds.model.language import decoder
from hive_ds.model.vision import vision_blocks


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Compile every encoder block, projector and LLM layer of a model in place; all of a kind share what is compiled.

    Our own attention stays outside: it is a kernel already, and its layout is another one in every batch. The flash
    attention of a library is inside, and the rotation before it compiled with it. The number of text tokens is symbolic
    from the start; that of images becomes so when it changes.
    """
    compile_encoder(model.vision_encoder, backend)
    layers = decoder(model.language_model).layers
    hive = hasattr(model, "routes")
    # What image features pass before they are keys: the norm of their layer after their projector.
    parts = [*model.projectors.values()] if hive else [model.projector]
    parts += [layers[index].input_layernorm for index in model.routes.blocks_by_layer] if hive else []
    for layer in layers:
        attention = layer.self_attn
        if not (isinstance(attention, HiveAttention) and attention.is_flash):
            attention.forward = torch.compiler.disable(attention.forward)
    for part in [*parts, *layers]:
        part.forward = torch.compile(part.forward, backend=backend, dynamic=True)


def compile_encoder(encoder: nn.Module, backend: str = "inductor") -> None:
    """Compile every block of a vision encoder in place."""
    for block in vision_blocks(encoder):
        block.forward = torch.compile(block.forward, backend=backend)
