"""Which attention runs where in a model, said before training and compiled before its first step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hive_ds.errors import HiveError
from hive_ds.kernels import Choice, choose_backend, warm_up
from hive_ds.model.attention import HiveAttention
from hive_ds.model.cascaded import CascadedForCausalLM
from hive_ds.model.flash import FLASH_BACKENDS, flash_attention_refusal
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.language import head_dim_of

TrainedModel = HiveForCausalLM | CascadedForCausalLM


def set_vision_attention(model: TrainedModel, name: str) -> None:
    """Let the vision encoder attend as ``name`` says: sdpa, flash_attention_2 or eager, as transformers has them.

    Raises:
        HiveError: it needs a package or a GPU that is not there.
    """
    try:
        model.vision_encoder.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise HiveError(f"model.vision_attention is {name!r}, which does not work here: {error}") from error


def describe_attention(model: TrainedModel, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A line for routed layers, un-routed layers and the encoder: which attention each runs, and why.

    Args:
        model: on whatever device.
        device: where it will train.
        dtype: in which its attention will compute.

    Raises:
        HiveError: a backend asked for by name does not work there.
    """
    lines = [
        f"attention of {len(layers)} {'routed' if kind.routed else 'un-routed'} LLM layers: "
        f"{_served(kind, device, dtype)}"
        for kind, layers in _kinds(model).items()
    ]
    vision = model.vision_encoder.config._attn_implementation
    return [*lines, f"attention of the vision encoder: {vision}, by transformers"]


def warm_up_attention(model: TrainedModel, device: torch.device, dtype: torch.dtype, *, answers: bool) -> float:
    """Compile the Triton kernels that training ``model`` will need, if it needs any; seconds it took.

    A compilation inside a step would look like a hang to the other ranks. The first process of a node compiles into a
    cache on that node's own disk, the others wait and load.

    Args:
        model: as its layers will run.
        device: where it trains.
        dtype: in which its attention computes.
        answers: it is asked questions as well, and decodes token by token.
    """
    served = [kind for kind in _kinds(model) if _choose(kind, device, dtype).backend == "triton"]
    return sum(
        warm_up(
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            qk_norm=qk_norm,
            rotate=rotate,
            decoding=answers,
        )
        for heads, groups, head_dim, qk_norm, rotate in sorted({kind[2:] for kind in served})
    )


class _Kind(NamedTuple):
    """LLM layers whose attention is one kernel."""

    routed: bool
    backend: str
    heads: int
    groups: int
    head_dim: int
    qk_norm: str
    rotate: bool
    """Whether queries and keys are rotated in the kernel, or come to it rotated."""


def _kinds(model: TrainedModel) -> dict[_Kind, list[int]]:
    """Kinds of attention in the model and their layers, routed ones first."""
    kinds: dict[_Kind, list[int]] = {}
    text = model.config.text_config
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    if isinstance(model, CascadedForCausalLM):  # queries and keys come to its attention normed and rotated
        kind = _Kind(False, model.attention_backend, heads, groups, head_dim_of(text), "none", rotate=False)
        return {kind: list(range(text.num_hidden_layers))}
    for module in model.modules():
        if isinstance(module, HiveAttention):
            kind = _Kind(module.routed, module.backend, heads, groups, module.head_dim, module.qk_norm, rotate=True)
            kinds.setdefault(kind, []).append(module.layer)
    return dict(sorted(kinds.items(), reverse=True))


def _choose(kind: _Kind, device: torch.device, dtype: torch.dtype) -> Choice:
    if kind.backend in FLASH_BACKENDS:
        refusal = flash_attention_refusal(kind.backend, device, dtype, kind.head_dim)
        if refusal is not None:
            raise HiveError(f"model.text_attention_backend is {kind.backend!r}, but {refusal}")
        return Choice(kind.backend, "asked for")
    try:
        return choose_backend(kind.backend, device=device, dtype=dtype, head_dim=kind.head_dim)
    except ValueError as error:
        key = "attention_backend" if kind.routed else "text_attention_backend"
        raise HiveError(f"model.{key}: {error}") from error


def _served(kind: _Kind, device: torch.device, dtype: torch.dtype) -> str:
    backend, reason = _choose(kind, device, dtype)
    return f"{backend} ({reason})"
