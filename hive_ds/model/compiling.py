"""torch.compile on the parts of a model that repeat, in a way that new lengths do not compile anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import modeling_layers

from hive_ds.kernels import choose_backend
from hive_ds.model.attention import HiveAttention
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.language import decoder
from hive_ds.model.runs import split_runs
from hive_ds.model.vision import run_blocks, vision_blocks


def compile_blocks(
    model: Any, device: torch.device, dtype: torch.dtype, backend: str = "inductor", *, apart: bool = False
) -> None:
    """Compile every encoder block, projector and run of LLM layers in place; all of a kind share what is compiled.

    Attention through our kernels or a library's is part of it: one operator, whose tables are made outside once a
    batch. Any other attention stays outside, for its layout is another one in every batch. The number of text tokens is
    symbolic from the start; that of images becomes so when it changes.

    Args:
        model: a HIVE or a cascaded model.
        device: where it will train.
        dtype: in which its attention will compute.
        backend: of torch.compile.
        apart: whether weights come layer by layer (ZeRO-3): a layer or projector is then a piece of its own, and what
            brings its weights stays outside.
    """
    torch._dynamo.config.specialize_float = True  # scales and epsilons: else a tensor each, made at every call
    # torch gives up on a function after so many compilations: all runs are one function, in validation too.
    torch._dynamo.config.recompile_limit = 64
    compile_encoder(model.vision_encoder, backend, apart=apart)
    compiled = partial(torch.compile, backend=backend, dynamic=True)
    layers = decoder(model.language_model).layers
    for layer in layers:
        attention = layer.self_attn
        if isinstance(attention, HiveAttention) and not attention.is_flash:
            attention.prepared = _is_triton(attention, device, dtype)
        if not _is_inside(attention):
            attention.forward = torch.compiler.disable(attention.forward)
    if isinstance(model, HiveForCausalLM) and not apart:
        model.image_states = compiled(model.image_states)
    else:
        for projector in [*model.projectors.values()] if isinstance(model, HiveForCausalLM) else [model.projector]:
            projector.forward = compiled(projector.forward)
    recomputed = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)  # by layers, in backward
    inside = all(_is_inside(layer.self_attn) for layer in layers)
    if isinstance(model, HiveForCausalLM) and inside and not apart and not recomputed:
        model.runs = split_runs(len(layers), model.routes.blocks_by_layer)
        model.run_layers = compiled(model.run_layers)
        return
    for layer in layers:
        layer.forward = compiled(_own_forward(layer))


def _is_inside(attention: nn.Module) -> bool:
    return isinstance(attention, HiveAttention) and (attention.is_flash or attention.prepared)


def _is_triton(attention: HiveAttention, device: torch.device, dtype: torch.dtype) -> bool:
    chosen = choose_backend(attention.backend, device=device, dtype=dtype, head_dim=attention.head_dim)
    return chosen.backend == "triton"


def compile_encoder(encoder: nn.Module, backend: str = "inductor", *, apart: bool = False) -> None:
    """Compile the blocks of a vision encoder in place: in runs, and one by one for callers that read in between."""
    blocks = vision_blocks(encoder)
    if not apart and not any(getattr(block, "gradient_checkpointing", False) for block in blocks):
        encoder.run_blocks = torch.compile(run_blocks, backend=backend)  # type: ignore[assignment]
    for block in blocks:
        block.forward = torch.compile(_own_forward(block), backend=backend)


def _own_forward(layer: nn.Module) -> Callable[..., Any]:
    """What a layer computes, without the wrapper that transformers 5.24 puts around it for gradient checkpointing.

    It is one function for all kinds of layers, and torch.compile counts what it compiled by functions: encoder and LLM
    would share the eight times after which it gives up.
    """
    forward = layer.forward
    function = getattr(forward, "__func__", None)
    is_wrapped = getattr(function, "__globals__", None) is vars(modeling_layers)
    if not is_wrapped or getattr(layer, "gradient_checkpointing", False):
        return forward
    return MethodType(function.__wrapped__, layer)  # type: ignore[union-attr]
