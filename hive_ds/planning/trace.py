"""The order in which a step enters and leaves modules, which decides when ZeRO-3 gathers which weights.

It is recorded by hooks where DeepSpeed has its own (0.19.8, `deepspeed.runtime.zero.parameter_offload`): around forward,
on what a module puts out, and on what it takes in by position. Arguments passed by name have no mark there either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FETCH, RELEASE = "fetch", "release"


@dataclass(frozen=True)
class Event:
    """A module needs its weights from here on, or no longer does."""

    kind: str
    """``fetch`` or ``release``."""
    module: str
    forward: bool
    recomputed: bool = False
    """A forward pass inside of backward, under gradient checkpointing."""


@contextmanager
def recorded_events(model: nn.Module) -> Iterator[list[Event]]:
    """Events of the forward and backward passes of ``model`` inside the block, on any device."""
    recorder = _Recorder(model)
    try:
        yield recorder.events
    finally:
        recorder.remove()


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
            return _on_tensors(mark, inputs)

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
