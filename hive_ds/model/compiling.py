"""torch.compile on the parts of a model that repeat, in a way that new lengths do not compile anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hive_ds.model.language import decoder
from hive_ds.model.vision import vision_blocks


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Compile every encoder block and LLM layer of a model in place; all of a kind share what is compiled.

    Attention of the LLM stays outside: it is a kernel already, and its layout is another one in every batch. The number
    of text tokens is symbolic from the start; that of images becomes so when it changes.
    """
    compile_encoder(model.vision_encoder, backend)
    for layer in decoder(model.language_model).layers:
        layer.self_attn.forward = torch.compiler.disable(layer.self_attn.forward)
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)


def compile_encoder(encoder: nn.Module, backend: str = "inductor") -> None:
    """Compile every block of a vision encoder in place."""
    for block in vision_blocks(encoder):
        block.forward = torch.compile(block.forward, backend=backend)
