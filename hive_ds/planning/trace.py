"""The order in which a step enters and leaves modules, which decides when ZeRO-3 gathers which weights.

It is recorded by hooks where DeepSpeed has its own (0.19.8, `deepspeed.runtime.zero.parameter_offload`): around
forward, on what a module puts out, and on what it takes in by position. What is passed by name has none there either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass(frozen=True, eq=False)
class Trace:
    """What forward and backward passes did."""

    events: list[Event] = field(default_factory=list)
    foreign: dict[str, set[str]] = field(default_factory=dict)
    """Names of parameters that a module looked at though they are another's, which has not been entered: ZeRO-3 gathers
    them with that module's own from then on. SigLIP's embeddings ask their convolution for its type, for example."""


@contextmanager
def recorded(model: nn.Module) -> Iterator[Trace]:
    """Trace of the forward and backward passes of ``model`` inside the block, on any device."""
    recorder = _Recorder(model)
    try:
        yield recorder.trace
    finally:
        recorder.remove()


def parameters_read(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters, and those of others that it says it reads (`hive_ds.training.engine` tells ZeRO-3)."""
    declared: Callable[[], list[nn.Parameter]] = getattr(module, "external_parameters", list)
    return [*module.parameters(recurse=False), *declared()]


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


class _Watched(dict[str, Any]):
    """A module's parameters, which tells of every look at one."""

    def __init__(self, parameters: dict[str, Any], look: Callable[[str], None]) -> None:
        super().__init__(parameters)
        self._look = look

    def __getitem__(self, name: str) -> Any:
        self._look(name)
        return super().__getitem__(name)


class _Recorder:
    """Hooks on every module, the root included."""

    def __init__(self, model: nn.Module) -> None:
        self.trace = Trace()
        self._waiting: dict[str, int] = {}
        self._running: list[str] = []
        self._model = model
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._reads = {
            name: {id(parameter) for parameter in parameters_read(module)} for name, module in model.named_modules()
        }
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            module._parameters = _Watched(module._parameters, self._look(module._parameters))
            self._handles.append(module.register_forward_pre_hook(self._before(name)))
            self._handles.append(module.register_forward_hook(self._after(name), always_call=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        for module in self._model.modules():
            module._parameters = dict(module._parameters)

    def _look(self, parameters: dict[str, Any]) -> Callable[[str], None]:
        def look(name: str) -> None:
            parameter = parameters[name]
            if parameter is None or not self._running:
                return
            if not any(id(parameter) in self._reads[module] for module in self._running):
                self.trace.foreign.setdefault(self._running[-1], set()).add(self._names[id(parameter)])

        return look

    def _before(self, name: str) -> Callable[..., Any]:
        def inputs_done() -> None:
            self._waiting[name] -= 1
            if self._waiting[name] == 0:
                self.trace.events.append(Event(RELEASE, name, forward=False))

        def mark(value: Tensor) -> Tensor:
            self._waiting[name] += value.requires_grad
            return _Mark.apply(value, inputs_done)

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            recomputed = torch._C._current_graph_task_id() != -1
            self.trace.events.append(Event(FETCH, name, forward=True, recomputed=recomputed))
            self._running.append(name)
            self._waiting[name] = 0
            return _on_tensors(mark, inputs)

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def output_needed() -> None:
            self.trace.events.append(Event(FETCH, name, forward=False))

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            self._running.pop()
            if output is None:  # checkpointing stopped its recomputation in here
                return None
            self.trace.events.append(Event(RELEASE, name, forward=True))
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
