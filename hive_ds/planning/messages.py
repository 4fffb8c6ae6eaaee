"""Collectives: what one rank takes part in, predicted or counted, and the bytes that it sends for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_gather", "reduce_scatter"

_KINDS = {
    "allreduce_": (ALL_REDUCE, 0),
    "_allgather_base_": (ALL_GATHER, 0),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
}
"""torch's c10d operator -> kind, and which argument is the whole tensor."""


@dataclass(frozen=True)
class Message:
    """One collective of one rank."""

    kind: str
    """``all_reduce``, ``all_gather`` or ``reduce_scatter``; a counted one of another kind has torch's own name."""
    bytes: int
    """Of the whole tensor: what an all-gather puts out, what the others take in."""
    ranks: int
    """Of the group that it runs in."""

    @property
    def sent(self) -> float:
        """Bytes that this rank sends, by the ring algorithm (NCCL's and gloo's for large tensors)."""
        rounds = 2 if self.kind == ALL_REDUCE else 1
        return rounds * self.bytes * (self.ranks - 1) / self.ranks


def bytes_sent(messages: Iterable[Message]) -> float:
    """Bytes that a rank sends for all of them."""
    return sum(message.sent for message in messages)


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
