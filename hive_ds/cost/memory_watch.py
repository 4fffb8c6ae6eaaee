"""What forward and backward hold in memory beside weights and gradients, op by op.

PyTorch's own `torch.distributed._tools.mem_tracker.MemTracker` refuses frozen parameters, which most stages have, and
compares every op with every module. This one follows storages alone; a test holds it to MemTracker's bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryWatch(TorchDispatchMode):
    """Follow what is allocated inside a ``with`` block.

    Args:
        held: tensors that were there before (weights, inputs), which do not count.

    Attributes:
        activations: bytes made in forward, or by its recomputation, at the moment of the peak.
        temporaries: bytes made in backward at that moment, gradients of parameters left out.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.activations = self.temporaries = 0
        self._live = {"activations": 0, "temporaries": 0}
        self._known = weakref.WeakSet([tensor.untyped_storage() for tensor in held])
        self._kinds: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        if sum(self._live.values()) > self.peak:
            self.activations, self.temporaries = self._live["activations"], self._live["temporaries"]
        return result

    @property
    def peak(self) -> int:
        """Bytes of both at that moment."""
        return self.activations + self.temporaries

    def follow_gradients(self, parameters: Iterable[Tensor]) -> list[Any]:
        """Leave gradients out as soon as they are a parameter's: who partitions them says what they take.

        Returns:
            Handles of the hooks, to be removed afterwards.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return [parameter.register_post_accumulate_grad_hook(self._leave_out) for parameter in trained]

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        # A graph task runs backward; recomputation under checkpointing runs inside one and counts as backward's.
        kind = "activations" if torch._C._current_graph_task_id() == -1 else "temporaries"
        self._live[kind] += storage.nbytes()
        self._kinds[storage] = cell = [kind]
        weakref.finalize(storage, self._forget, cell, storage.nbytes())

    def _forget(self, cell: list[str], size: int) -> None:
        if cell:
            self._live[cell[0]] -= size

    def _leave_out(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        cell = self._kinds.get(gradient.untyped_storage())
        if cell:
            self._live[cell.pop()] -= gradient.untyped_storage().nbytes()
