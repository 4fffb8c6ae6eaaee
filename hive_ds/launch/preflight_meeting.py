"""The nodes that came to the preflight's network check, and a key-value store through which they talk."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

MEET = timedelta(seconds=60)
"""From the first node to the last: on a shared disk that is not warm, imports alone take half of that."""
EXCHANGE = timedelta(seconds=10)


@dataclass(frozen=True)
class Meeting:
    """The nodes that came."""

    store: dist.TCPStore
    nodes: list[str]
    absent: list[str]
    index: int
    """Of this node."""
    skew: float
    """Seconds that this node's clock is ahead of the first one's, and the moment that an answer took."""

    @classmethod
    def join(cls, store: dist.TCPStore, nodes: Sequence[str], node: str) -> Meeting:
        """Wait for the others; the first one closes the door. RuntimeError for who comes too late, or is alone."""
        keys = [f"here/{other}" for other in nodes]
        store.set(f"here/{node}", "")
        if node == nodes[0]:
            deadline = time.monotonic() + MEET.total_seconds()
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.02)
            store.set("came", json.dumps([[other for other in nodes if store.check([f"here/{other}"])], time.time()]))
        store.wait(["came"], 2 * MEET)
        came, clock = json.loads(store.get("came"))
        skew = time.time() - clock
        if node not in came or len(came) == 1:
            raise RuntimeError(f"{len(came)} of {len(nodes)} came in time: {', '.join(came)}")
        return cls(store, came, [other for other in nodes if other not in came], came.index(node), skew)

    def say(self, topic: str, value: Any) -> None:
        """Let the others know."""
        self.store.set(f"{topic}/{self.index}", json.dumps(value))

    def wait_for_all(self, topic: str, patience: timedelta = 2 * EXCHANGE) -> list[str]:
        """Return once every node has said something, or after a while; the store's keys, by node."""
        keys = [f"{topic}/{index}" for index in range(len(self.nodes))]
        with contextlib.suppress(dist.DistStoreError):
            self.store.wait(keys, patience)
        return keys

    def hear(self, topic: str, patience: timedelta = 2 * EXCHANGE) -> list[Any]:
        """What each node said, once all have; None for those that say nothing for too long."""
        keys = self.wait_for_all(topic, patience)
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]

    def agree(self, topic: str, decide: Callable[[], Any]) -> Any:
        """What the first node decides; the others wait for it."""
        if self.index == 0:
            self.store.set(topic, json.dumps(decide()))
        self.store.wait([topic], 6 * EXCHANGE)
        return json.loads(self.store.get(topic))
