"""Where this process is in its work: what a dump says when nothing moves any more.

The loop marks phases (`here.enter`), which costs an attribute or two. The module that runs is not kept at all: it is
read from the Python stack when somebody asks. Only backward needs help, because autograd calls no module: each block
leaves a mark in the graph.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

_LOCALS = ("self", "sub_module", "module")
"""Where a frame keeps the module it works for: a module's own code, and ZeRO-3's hooks around it."""
_COLLECTIVE_FILES = ("/torch/distributed/", "/deepspeed/comm/", "/hive_ds/training/distributed.py")
_WAITS = {"wait", "synchronize"}
_WAITING_FILES = ("/torch/cuda/", "/deepspeed/runtime/")
_BACKWARD = ("_engine_run_backward", "/torch/autograd/graph.py")
"""Where the main thread is while autograd works."""


class Place:
    """Step, phase and samples of this process; `marks` grows with every change of phase."""

    def __init__(self) -> None:
        self.step = 0
        """Optimizer step that is being done, counted from 1."""
        self.steps_begun = 0
        """By this process; a resumed run begins its first step like any other."""
        self.phase = "start"
        self.samples: Sequence[str] = ()
        """Ids of the current micro-batch."""
        self.marks = 0
        self._block: str | None = None
        self._names: dict[nn.Module, str] = {}

    def begin_step(self, step: int) -> None:
        """A step begins; the loop fetches the data of the next one before it ends."""
        self.step, self.steps_begun = step, self.steps_begun + 1

    def enter(self, phase: str, samples: Sequence[str] | None = None) -> None:
        """Another phase begins, with these samples or with the ones before."""
        if samples is not None:
            self.samples = samples
        self.phase, self._block, self.marks = phase, None, self.marks + 1

    def follow(self, model: nn.Module) -> None:
        """Know the modules of ``model`` by name, and mark its blocks (the entries of module lists) in backward."""
        self._names = {module: name or type(module).__name__ for name, module in model.named_modules()}
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                for key, block in module.named_children():
                    block.register_forward_hook(partial(self._mark_output, f"{name}.{key}"))

    def describe(self, error: Exception | None = None) -> dict[str, Any]:
        """What there is to say about this process, now or where ``error`` was raised; the values are JSON."""
        main = main_frame() if error is None else _frame_of(error)
        stacks = [frame for frame in (main, *(_other_frames() if error is None else ())) if frame is not None]
        module = next((name for stack in stacks if (name := self._module_in(stack))), self._block)
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self.step,
            "phase": self.phase,
            "module": module,
            "samples": list(self.samples),
            "in_collective": main is not None and any(map(waits_for_others, _that_work(main, stacks))),
            "marks": self.marks,
        }

    def _mark_output(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(partial(self._enter_block, name))

    def _enter_block(self, name: str, _gradients: Any) -> None:
        self._block = name

    def _module_in(self, frame: FrameType | None) -> str | None:
        """The innermost module that works in a stack."""
        while frame is not None:
            for name in _LOCALS:
                value = frame.f_locals.get(name)
                if isinstance(value, nn.Module) and value in self._names:
                    return self._names[value]
            frame = frame.f_back
        return None


def waits_for_others(frame: FrameType) -> bool:
    """Whether a stack ends in a collective, or in the wait for one that was started before."""
    code = frame.f_code
    in_collective = any(part in code.co_filename for part in _COLLECTIVE_FILES)
    return in_collective or (code.co_name in _WAITS and any(part in code.co_filename for part in _WAITING_FILES))


def _that_work(main: FrameType, stacks: list[FrameType]) -> list[FrameType]:
    """The stack of the main thread; while autograd works, which has threads of its own on GPUs, all of them."""
    name, file = _BACKWARD
    return stacks if main.f_code.co_name == name and main.f_code.co_filename.endswith(file) else [main]


def one_line(place: dict[str, Any]) -> str:
    """The answer of `Place.describe` for a log."""
    samples = json.dumps(place["samples"])
    return f"step {place['step']}, {place['phase']}, module {place['module'] or 'none'}, samples {samples}"


def _frame_of(error: Exception) -> FrameType | None:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1] if frames else None


def main_frame() -> FrameType | None:
    """Where the main thread is."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _other_frames() -> list[FrameType]:
    """Stacks of the other threads: on GPUs backward, recomputation included, runs in one of autograd's."""
    main = threading.main_thread().ident
    return [frame for ident, frame in sys._current_frames().items() if ident not in (main, threading.get_ident())]


here = Place()
"""This process's place."""
