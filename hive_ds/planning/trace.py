"""The order in which a step enters and leaves modules, which decides when ZeRO-3 gathers which weights.

The order does not depend on widths. It is recorded on a model of the same build whose layers are narrow, in one forward
and backward pass, by hooks at the places where DeepSpeed has its own (0.19.8, `deepspeed.runtime.zero.parameter_offload`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hive_ds.model.attention_backends import set_vision_attention
from hive_ds.model.cascaded import CascadedForCausalLM
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.vision import vision_class

FETCH, RELEASE = "fetch", "release"

_NARROW_HEAD, _NARROW_VOCABULARY, _TEXT_TOKENS = 4, 64, 6


@dataclass(frozen=True)
class Event:
    """A module needs its weights from here on, or no longer does."""

    kind: str
    """``fetch`` or ``release``."""
    module: str
    forward: bool
    recomputed: bool = False
    """A forward pass inside of backward, under gradient checkpointing."""


def record_trace(model: nn.Module, batch: dict[str, Any]) -> list[Event]:
    """Events of one forward and backward pass of ``model``, whose `requires_grad` is planned, over ``batch``."""
    recorder = _Recorder(model)
    try:
        model(**batch).loss.backward()
    finally:
        recorder.remove()
    return recorder.events


def narrow_model(model: Any, *, gradient_checkpointing: bool) -> Any:
    """A model of the same build as ``model`` (on any device), with narrow layers and random weights, on the CPU."""
    vision = _narrow(model.config.vision_config)
    text = _narrow(model.config.text_config)
    if hasattr(text, "vocab_size"):
        text.vocab_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = _NARROW_VOCABULARY, None, 1, 2
    towers = vision_class(vision)(vision), AutoModelForCausalLM.from_config(text)
    config = copy.deepcopy(model.config)
    config.vision_config, config.text_config = vision, text
    if isinstance(config, HiveConfig):
        config.attention_backend = config.text_attention_backend = "sdpa"
        narrow: Any = HiveForCausalLM(config, *towers)
    else:
        config.image_token_index = _NARROW_VOCABULARY - 1
        narrow = CascadedForCausalLM(config, *towers, attention_backend="sdpa")
    set_vision_attention(narrow, "sdpa")
    for name, parameter in model.named_parameters():
        narrow.get_parameter(name).requires_grad_(parameter.requires_grad)
    if gradient_checkpointing:
        narrow.gradient_checkpointing_enable()
    return narrow.train()


def narrow_batch(narrow: Any) -> dict[str, Any]:
    """One text and one image for a `narrow_model`."""
    vision = narrow.config.vision_config
    images: dict[str, Tensor] = {"pixel_values": torch.zeros(1, 3, *[getattr(vision, "image_size", 0)] * 2)}
    if not getattr(vision, "image_size", 0):  # variable resolution: patches come flattened
        patches = vision.num_patches
        images = {
            "pixel_values": torch.zeros(1, patches, 3 * vision.patch_size**2),
            "pixel_attention_mask": torch.ones(1, patches, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[2, patches // 2]]),
        }
    ids = torch.arange(3, 3 + _TEXT_TOKENS)
    return {"input_ids": ids, "labels": ids, "text_lengths": [_TEXT_TOKENS], "image_offsets": [[0]], **images}


def _narrow(config: Any) -> Any:
    """``config`` with a small head, so that widths are a few dozen; depth, heads and norms stay."""
    narrow = copy.deepcopy(config)
    narrow.hidden_size = _NARROW_HEAD * narrow.num_attention_heads
    narrow.intermediate_size = narrow.hidden_size
    if getattr(narrow, "head_dim", None):
        narrow.head_dim = _NARROW_HEAD
    if hasattr(narrow, "image_size"):
        narrow.image_size = 2 * narrow.patch_size
    if hasattr(narrow, "num_patches"):
        narrow.num_patches = 4
    return narrow


class _Mark(torch.autograd.Function):
    """Hands a tensor on, and calls back when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.call()
        return gradients[0], None


class _Recorder:
    """Hooks on every module, the root included."""

    def __init__(self, model: nn.Module) -> None:
        self.events: list[Event] = []
        self._waiting: dict[str, int] = {}
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._before(name)))
            self._handles.append(module.register_forward_hook(self._after(name)))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str) -> Callable[..., Any]:
        def inputs_done() -> None:
            self._waiting[name] -= 1
            if self._waiting[name] == 0:
                self.events.append(Event(RELEASE, name, forward=False))

        def mark(value: Tensor) -> Tensor:
            self._waiting[name] += value.requires_grad
            return _Mark.apply(value, inputs_done)

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            recomputed = torch._C._current_graph_task_id() != -1
            self.events.append(Event(FETCH, name, forward=True, recomputed=recomputed))
            self._waiting[name] = 0
            return _on_tensors(mark, inputs)  # what is passed by name has no mark, in DeepSpeed neither

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def output_needed() -> None:
            self.events.append(Event(FETCH, name, forward=False))

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            self.events.append(Event(RELEASE, name, forward=True))
            return _on_tensors(lambda value: _Mark.apply(value, output_needed), output)

        return hook


def _on_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to the tensors in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_on_tensors(function, item) for item in value)
    if isinstance(value, dict):
        for key in value:
            value[key] = _on_tensors(function, value[key])
    return value
