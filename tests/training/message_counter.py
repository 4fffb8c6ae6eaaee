"""The collectives of a real step, recorded beside what planning predicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from hive_ds.planning.messages import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Message

_KINDS = {
    "allreduce_": (ALL_REDUCE, 0),
    "_allgather_base_": (ALL_GATHER, 0),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
}
"""torch's c10d operator -> kind, and which argument is the whole tensor."""


def tally(messages: Iterable[Message]) -> dict[str, dict[str, float]]:
    """Number, bytes and bytes sent of each kind and size of group, as ``all_gather of 8``."""
    rows: dict[str, dict[str, float]] = {}
    for message, count in sorted(Counter(messages).items(), key=lambda item: (item[0].kind, item[0].ranks)):
        row = rows.setdefault(f"{message.kind} of {message.ranks}", {"messages": 0, "bytes": 0, "sent": 0})
        row["messages"] += count
        row["bytes"] += count * message.bytes
        row["sent"] += count * message.sent
    return rows


class MessageCounter(TorchDispatchMode):
    """While active, records every collective of this thread, DeepSpeed's and our own.

    A collective that planning does not know has torch's own name for its kind.
    On CPUs backward runs on the thread that calls it, so its collectives are seen too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _record(self, operator: str, args: tuple[Any, ...]) -> None:
        kind, place = _KINDS.get(operator, (operator, 0))
        groups = [ProcessGroup.unbox(arg) for arg in args if _is_group(arg)]
        whole = args[place]
        tensors = [whole] if isinstance(whole, Tensor) else whole
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor)]
        self.messages.append(Message(kind, sum(sizes), groups[0].size() if groups else 1))


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and value._type().qualified_name().endswith("ProcessGroup")
