"""Starting a Triton kernel for a part of the host's time that its own call takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tiles import INTERPRETED


class Settings:
    """Constants of a kernel and options of the compiler. Make each once and keep it: equal ones are not the same."""

    def __init__(self, **values: int | bool) -> None:
        self.values = values


class Launcher:
    """A Triton kernel that keeps what was compiled for each sort of arguments and starts it directly.

    Triton looks at every argument of every call to find what it has compiled for such ones: 50 us for 30 of them, where
    many of our kernels run for less. What it looks at is known here: dtypes, and which addresses and strides are
    multiples of 16 or strides of 1.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._constants: list[str] = [] if INTERPRETED else [p.name for p in kernel.params if p.is_constexpr]
        self._compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def __call__(self, programs: int, pointers: Sequence[Tensor], numbers: Sequence[float], settings: Settings) -> None:
        """Start the kernel.

        Args:
            programs: of the grid.
            pointers: its first arguments, all on the current device.
            numbers: those after them.
            settings: all that is left.
        """
        if INTERPRETED or torch.version.hip:  # for AMD Triton looks at more
            self.kernel[(programs,)](*pointers, *numbers, **settings.values)
            return
        key = (
            settings,
            pointers[0].get_device(),
            *[x.dtype for x in pointers],
            *[x.data_ptr() % 16 for x in pointers],
            *[1 if n == 1 else (n % 16 == 0, n >> 31) for n in numbers if type(n) is int],
        )
        found = self._compiled.get(key)
        if found is None:
            compiled = self.kernel[(programs,)](*pointers, *numbers, **settings.values)
            self._compiled[key] = compiled, [settings.values[name] for name in self._constants]
            return
        compiled, constants = found
        compiled[programs, 1, 1](*pointers, *numbers, *constants)
