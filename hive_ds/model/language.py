"""What an LLM must look like to take routes, and a named refusal for what it may not have."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import masking_utils

from hive_ds.errors import HiveError
from hive_ds.model.positions import RotaryFrequencies

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
ATTENTION_INPUTS = {"self", "hidden_states", "position_embeddings", "attention_mask"}
"""All that an LLM's own attention may ask for: one that asks for positions scales its queries by them."""
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
"""What our attention computes; whatever else an LLM's own has would be left out without a word."""
FUSED_QKV = ("qkv_proj", "query_key_value", "c_attn", "W_pack", "Wqkv")
SCALED_OUTSIDE_ATTENTION = ("embedding_multiplier", "scale_emb", "logits_scaling", "logit_scale")


def decoder(language_model: transformers.PreTrainedModel) -> Any:
    """The LLM without its head: embeddings, layers, final norm, rotary embedding."""
    return language_model.model


def head_dim_of(config: transformers.PretrainedConfig) -> int:
    """Width of one head of an LLM (K)."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_language_model(language_model: transformers.PreTrainedModel) -> None:
    """Refuse an LLM whose attention is not q/k/v/o projections with plain rotary positions.

    Raises:
        HiveError: names the LLM's type and the feature that is not supported.
    """
    config = language_model.config
    trunk: Any = getattr(language_model, "model", None)
    if not all(hasattr(trunk, part) for part in ("embed_tokens", "layers", "norm")):
        raise _refusal(config, "a decoder that is not `model.embed_tokens` + `model.layers` + `model.norm`")
    for layer in trunk.layers:
        _check_attention(config, getattr(layer, "self_attn", None))
        if not hasattr(layer, "input_layernorm"):
            raise _refusal(config, "a decoder layer without `input_layernorm`")
        if "position_embeddings" in _required(type(layer).forward):
            raise _refusal(config, "decoder layers that must be handed rotary tables")
    _check_positions(config, trunk)
    _check_scaling(config)
    if not all(hasattr(layer.self_attn, "scaling") for layer in trunk.layers):
        raise _refusal(config, "no `scaling` in its attention")
    if not hasattr(config, "rms_norm_eps"):
        raise _refusal(config, "no RMS norms (`rms_norm_eps`)")


def check_window(config: transformers.PretrainedConfig, max_length: int | None) -> None:
    """HiveError where the LLM's sliding window is shorter than ``max_length``, if any."""
    window = sliding_window(config)
    if max_length is not None and window is not None and window < max_length:
        raise HiveError(
            f"language model {config.model_type!r} has a sliding window of {window} tokens, shorter than the recipe's "
            f"data.max_length of {max_length}; set data.max_length to at most {window}"
        )


def check_texts(config: transformers.PretrainedConfig, lengths: Sequence[int]) -> None:
    """HiveError where a text of so many tokens, cached ones among them, is longer than the LLM's sliding window."""
    window = sliding_window(config)
    if window is not None and max(lengths, default=0) > window:
        raise HiveError(
            f"a text of {max(lengths)} tokens is longer than the sliding window of the language model; "
            f"at most {window} tokens are supported"
        )


def sliding_window(config: transformers.PretrainedConfig) -> int | None:
    """The LLM's sliding window in tokens, or None if it attends to everything."""
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", window is not None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        uses = uses and "sliding_attention" in layer_types
    return window if uses else None


def longest_text(config: transformers.PretrainedConfig) -> int:
    """Tokens of the longest text that an LLM takes: those that it has positions for, within its sliding window."""
    positions = int(config.max_position_embeddings)
    window = sliding_window(config)
    return positions if window is None else min(positions, window)


def _refusal(config: transformers.PretrainedConfig, feature: str) -> HiveError:
    return HiveError(
        f"language model {config.model_type!r} is not supported: it has {feature}; expected an LLM with q/k/v/o "
        "projections and plain rotary positions, such as Llama, Qwen2, Qwen3 or Mistral"
    )


def _check_attention(config: transformers.PretrainedConfig, attention: Any) -> None:
    if attention is None:
        raise _refusal(config, "a decoder layer without `self_attn`")
    for name in FUSED_QKV:
        if hasattr(attention, name):
            raise _refusal(config, f"fused qkv projections ({name})")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        if not isinstance(getattr(attention, name, None), nn.Linear):
            raise _refusal(config, f"no linear `{name}` in its attention")
    if getattr(attention, "sinks", None) is not None:
        raise _refusal(config, "attention sinks")
    if needed := sorted(_required(type(attention).forward) - ATTENTION_INPUTS):
        raise _refusal(config, f"an attention that must be handed `{needed[0]}`")
    parts = [name for name, child in attention.named_children() if next(child.parameters(), None) is not None]
    for name in (*parts, *(name for name, _ in attention.named_parameters(recurse=False))):
        if name not in ATTENTION_PARTS:
            raise _refusal(config, f"`{name}` in its attention")
    if getattr(config, "attention_dropout", 0.0) > 0:
        raise _refusal(config, f"attention dropout of {config.attention_dropout}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            raise _refusal(config, f"logit soft-capping ({name})")
    norm = getattr(attention, "q_norm", None)
    if norm is not None and not hasattr(norm, "variance_epsilon"):
        raise _refusal(config, f"a query norm of another kind than Llama's ({type(norm).__name__})")
    if norm is not None and norm.weight.numel() != attention.head_dim:
        raise _refusal(config, "a query norm over all heads at once")


def _required(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments that have no default."""
    parameters = inspect.signature(function).parameters.items()
    return {name for name, one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD}


def _check_positions(config: transformers.PretrainedConfig, trunk: Any) -> None:
    if getattr(config, "alibi", False):
        raise _refusal(config, "ALiBi positions")
    rotary = getattr(trunk, "rotary_emb", None)
    if rotary is None:
        raise _refusal(config, "no rotary positions")
    rope_type = getattr(rotary, "rope_type", "default")
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise _refusal(config, f"length-dependent rotary positions ({rope_type})")
    attention = trunk.layers[0].self_attn
    if not hasattr(rotary, "inv_freq"):
        raise _refusal(config, "rotary frequencies that are not one list for all layers and lengths")
    rotated = 2 * len(RotaryFrequencies(rotary).inv_freq)
    if rotated != attention.head_dim:
        raise _refusal(config, f"partial rotary positions ({rotated} of {attention.head_dim} dimensions)")
    if not _rotates_halves(attention):
        raise _refusal(config, "interleaved rotary positions")
    if not all(_is_rotated(layer.self_attn) for layer in trunk.layers):
        raise _refusal(config, "layers without rotary positions")


def _rotates_halves(attention: nn.Module) -> bool:
    """Ask the LLM's own code how it pairs dimensions: halves (Llama) or neighbours."""
    rotate = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    with torch.device("cpu"):  # the model may be under construction on the meta device
        return rotate is not None and rotate(torch.tensor([0.0, 1.0, 2.0, 3.0])).tolist() == [-2.0, -3.0, 0.0, 1.0]


class _TableReadError(Exception):
    pass


class _Table:
    """Stands in for a rotary table, and says when it is read."""

    def __getattr__(self, name: str) -> Any:
        raise _TableReadError


def _is_rotated(attention: Any) -> bool:
    """Ask the LLM's own code whether this layer reads the rotary tables; some models leave layers without positions."""
    shapes = {name: torch.empty_like(values, device="meta") for name, values in attention.named_parameters()}
    token = torch.empty(1, 1, attention.q_proj.in_features, dtype=attention.q_proj.weight.dtype, device="meta")
    tables = {"position_embeddings": (_Table(), _Table()), "attention_mask": None}
    try:
        torch.func.functional_call(attention, shapes, (token,), tables)
    except _TableReadError:
        return True
    return False


def _check_scaling(config: transformers.PretrainedConfig) -> None:
    for name in SCALED_OUTSIDE_ATTENTION:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise _refusal(config, f"embeddings or logits scaled by `{name}`")
    if config.model_type.startswith("gemma"):
        raise _refusal(config, "embeddings scaled by the square root of their width")


def ask_no_gradient_of_inputs(model: transformers.PreTrainedModel) -> None:
    """Undo what transformers 5.24 adds to gradient checkpointing: embeddings whose output asks for a gradient.

    Non-reentrant checkpointing does without, and backward would go on through frozen layers down to the embeddings.
    """
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Keep transformers 5 from looking into position ids for where the sequences of a row begin.

    On a GPU the host would wait for that, and on the meta device ids hold no values.
    """
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look
