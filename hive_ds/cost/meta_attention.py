"""Attention for models on the meta device: the shapes, the memory and the FLOPs of a fused kernel, nothing computed.

On the meta device transformers would write attention out, with every score in memory, and our own would read lengths
back from tensors that hold none. Encoders and cascaded LLMs attend through `padded_attention`, which keeps queries,
keys, values, output and log-sum-exp for backward, as fused kernels on GPUs do; HIVE's layers through the Triton op.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hive_ds.kernels.padded_op import padded_attention
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.cascaded import CascadedForCausalLM
from hive_ds.model.language import decoder, head_dim_of
from hive_ds.training.flops import BatchSize

_ENCODER, _LANGUAGE = "hive_meta_encoder", "hive_meta_language"

ATTENTION_BACKWARD = (
    torch.ops.hive_ds.padded_attention_backward,
    torch.ops.hive_ds.hierarchical_attention_backward,
)
"""Backward of the ops that attend; PyTorch counts five products each, of which one repeats the scores."""


def attend_on_meta(model: TrainedModel, size: BatchSize) -> None:
    """Let ``model`` attend by ops that know the visible pairs of batches of this size."""
    for name, causal, pairs in (
        (_ENCODER, False, size.encoder_pairs),
        (_LANGUAGE, True, size.sequence_pairs),
    ):
        AttentionInterface.register(name, partial(_attend, causal=causal, pairs=pairs))
        AttentionMaskInterface.register(name, _no_mask)
    model.vision_encoder.set_attn_implementation(_ENCODER)
    if isinstance(model, CascadedForCausalLM):
        model.language_model.set_attn_implementation(_LANGUAGE)
        # Its own asks autocast, which knows no meta device.
        decoder(model.language_model).rotary_emb.forward = partial(_rotation, model.config.text_config)


def _rotation(config: Any, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of cosines and sines (B, T, K)."""
    shape = (*position_ids.shape, head_dim_of(config))
    return hidden.new_empty(shape), hidden.new_empty(shape)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    causal: bool,
    pairs: int,
    **unused: object,
) -> tuple[Tensor, None]:
    """(B, H, T, K) queries, (B, G, T, K) keys and values -> (B, T, H, K)."""
    return padded_attention(query, key, value, None, causal, scaling, pairs)[0].transpose(1, 2), None


def _no_mask(*arguments: Any, **unused: object) -> None:
    """Of transformers' masks none is needed: the op knows what is seen."""
