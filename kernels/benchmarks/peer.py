"""What every way of computing hierarchical attention has to offer to be checked and timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from hive_ds.kernels.finish import finish

from .case import Arguments, Case

EPS = 1e-6
Function = TypeVar("Function", bound=Callable[..., Any])


class Peer:
    """One implementation, made for one case."""

    name: str
    label: str

    def __init__(self, case: Case) -> None:
        self.case, self.layout, self.shape = case, case.layout, case.shape

    @property
    def detail(self) -> str:
        """Which library does the work, where that depends on the machine."""
        return ""

    @property
    def graphed(self) -> bool:
        """Whether it is timed as a CUDA graph."""
        return True

    def refuses(self, direction: str) -> str | None:
        """Why it cannot do ``direction`` here; None if it can."""
        return None

    def native(self, arguments: Arguments) -> Arguments:
        """The arguments in the form in which a model built on this peer would have them. Not timed."""
        return arguments

    def native_output(self, out: Tensor) -> Tensor:
        """A packed output, or its cotangent, in this peer's form. Not timed."""
        return out

    def packed(self, name: str, x: Tensor) -> Tensor:
        """An output ("out") or a gradient (by argument name) of this peer, packed."""
        return x

    def __call__(self, a: Arguments) -> Tensor:
        """The attention output. Timed."""
        raise NotImplementedError

    def finished(self, a: Arguments, name: str) -> Tensor:
        """q, k or image_k of ``a``, packed, normed and rotated."""
        weight = a["q_norm_weight" if name == "q" else "k_norm_weight"]
        prefix = "image_" if name == "image_k" else ""
        return finish(a[name], weight, EPS, self.shape.qk_norm, a[f"{prefix}cos"], a[f"{prefix}sin"])

    def compiled(self, function: Function) -> Function:
        """``function``, compiled on a GPU; on a CPU compiling would take longer than all the tiny shapes."""
        return cast(Function, torch.compile(function, dynamic=False)) if self.case.device.type == "cuda" else function
