"""How a step's time divides into its parts, from a trace of torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from hive_ds.model.language import decoder
from hive_ds.model.vision import block_runner, running_blocks

PARTS = ("encoder", "projectors", "LLM", "attention of the LLM", "optimizer", "data", "communication", "other")
ATTENTION = ("hive_ds::", "scaled_dot_product", "flash_attn", "flash_attention", "varlen_attn")
"""In names of operators that attend."""
PIECES = {"image_states": "projectors", "run_layers": "LLM"}
"""Attribute through which a HIVE model calls its projectors or its layers -> their part."""
COMMUNICATION = ("nccl", "gloo", "c10d::")
"""In names of operators that send."""


class Marked:
    """Marks in the trace around the modules of a model, while it is entered."""

    def __init__(self, model: Any) -> None:
        trunk = decoder(model.language_model)
        modules = [("encoder", model.vision_encoder), *(("LLM", module) for module in (trunk.embed_tokens, trunk.norm))]
        if not hasattr(model, "routes"):
            modules += [("projectors", model.projector), *(("LLM", layer) for layer in trunk.layers)]
        modules += [("LLM", model.language_model.lm_head), ("LLM", model.language_loss)]
        named = model.vision_encoder.named_modules()
        modules += [("encoder", module) for name, module in named if name.endswith("embeddings")]
        self._modules: list[tuple[str, nn.Module]] = modules
        self._model = model

    def __enter__(self) -> None:
        open_marks: list[Any] = []

        def enter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                mark = record_function(f"part:{name}")
                mark.__enter__()
                open_marks.append(mark)

            return hook

        def leave(*_: Any) -> None:
            open_marks.pop().__exit__(None, None, None)

        # All these run in pieces that may be compiled: a hook inside of one would compile it anew.
        self._pieces = {name: getattr(self._model, name) for name in PIECES if hasattr(self._model, name)}
        for name, piece in self._pieces.items():
            setattr(self._model, name, _marked_piece(PIECES[name], piece))
        encoder = self._model.vision_encoder
        self._encoder = running_blocks(encoder, _marked_piece("encoder", block_runner(encoder)))
        self._encoder.__enter__()
        self._handles = []
        for name, module in self._modules:
            self._handles.append(module.register_forward_pre_hook(enter(name)))
            # Recomputation for backward leaves the last module by an exception.
            self._handles.append(module.register_forward_hook(leave, always_call=True))

    def __exit__(self, *_: object) -> None:
        self._encoder.__exit__(None, None, None)
        for name, piece in self._pieces.items():
            setattr(self._model, name, piece)
        for handle in self._handles:
            handle.remove()


def _marked_piece(part: str, piece: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*arguments: Any) -> Any:
        with record_function(f"part:{part}"):
            return piece(*arguments)

    return marked


@contextmanager
def traced(model: Any, device: torch.device) -> Iterator[profile]:
    """A trace of what runs inside, marked so that `shares_of` finds the parts in its events."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with Marked(model), profile(activities=activities) as trace:
        yield trace
        if cuda:
            torch.cuda.synchronize()


def shares_of(events: list[Any], *, cuda: bool) -> dict[str, float]:
    """Share of each of `PARTS` in the time of a trace's events: of all GPU kernels, or of all operators on a CPU.

    A gradient counts to the part whose forward pass it belongs to.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    owners = _forward_parts(events)
    for event in events:
        own = own_time(event, cuda=cuda)
        if own > 0:
            seconds[_part(event, owners)] += own
    total = sum(seconds.values())
    return {name: round(value / total, 4) for name, value in seconds.items()} if total else {}


def slowest_kernels(events: list[Any], count: int = 20) -> dict[str, Any]:
    """Milliseconds of all GPU kernels of a trace (``all``), and of those that took most: (name, ms, launches)."""
    sums: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            entry = sums.setdefault(event.name, [0.0, 0])
            entry[0] += event.time_range.elapsed_us() / 1e3
            entry[1] += 1
    order = sorted(sums, key=lambda name: -sums[name][0])
    named = [(name[:100], round(sums[name][0], 3), sums[name][1]) for name in order[:count]]
    return {"all": round(sum(ms for ms, _ in sums.values()), 3), "most": named}


def own_time(event: Any, *, cuda: bool) -> float:
    """Microseconds of an operator without those inside it: of its GPU kernels, or of the thread that called it."""
    if cuda:
        return event.self_device_time_total if event.device_type == torch.autograd.DeviceType.CPU else 0.0
    return 0.0 if event.is_async else event.self_cpu_time_total


def _forward_parts(events: list[Any]) -> dict[tuple[int, int], str]:
    """Thread and number of each node of the graph -> part that made it; of operators with one number the last did.

    Every thread counts for itself: on a GPU what is recomputed for backward is numbered by a thread of autograd.
    """
    owners: dict[tuple[int, int], str] = {}
    for event in sorted(events, key=lambda one: one.time_range.start):
        part = _marked(event)
        if event.sequence_nr >= 0 and part is not None:
            owners[event.thread, event.sequence_nr] = part
    return owners


def _marked(event: Any) -> str | None:
    """Part of a forward operator by what lies around it."""
    attends = False
    while event is not None:
        if event.name.startswith("part:"):
            part = event.name.removeprefix("part:")
            return "attention of the LLM" if part == "LLM" and attends else part
        attends = attends or any(name in event.name for name in ATTENTION)
        event = event.cpu_parent
    return None


def _part(event: Any, owners: dict[tuple[int, int], str]) -> str:
    part, attends = _marked(event), False
    one = event
    while part is None and one is not None:
        attends = attends or any(name in one.name for name in ATTENTION)
        if any(name in one.name for name in COMMUNICATION):
            part = "communication"
        elif one.name.startswith("autograd::engine::evaluate_function") or "Backward" in one.name:
            part = owners.get((one.fwd_thread, one.sequence_nr))
        one = one.cpu_parent
    if part == "LLM" and attends:  # inside the gradient of a compiled piece
        return "attention of the LLM"
    return part if part in PARTS else "other"
