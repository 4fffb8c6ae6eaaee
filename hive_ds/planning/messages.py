"""Collectives: what one rank takes part in, and the bytes that it sends for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_gather", "reduce_scatter"


@dataclass(frozen=True)
class Message:
    """One collective of one rank."""

    kind: str
    """``all_reduce``, ``all_gather`` or ``reduce_scatter``."""
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
