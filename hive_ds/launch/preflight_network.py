"""Do the nodes reach one another, and how fast: pairs first, so that a bad node has a name, then all at once.

The nodes meet at a key-value store on the first one. Each exchanges data with its two neighbours of a ring, over TCP;
one that cannot, or is far slower than the others, is out, and so is one whose versions, clock or GPUs differ. The rest
does one all-reduce together, over NCCL where there are GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hive_ds.launch.network import choose_interface, interface_addresses
from hive_ds.launch.preflight import node_name, write_faults
from hive_ds.launch.preflight_verdict import compare_nodes, judge_links, links

MEET = timedelta(seconds=60)
"""From the first node to the last: on a shared disk that is not warm, imports alone take half of that."""
EXCHANGE = timedelta(seconds=10)
SIZE = 64 << 20
"""Bytes: enough to fill a link, and quick on a slow one."""


def check_network(out: Path, nodes: Sequence[str], port: int) -> None:
    """Take part as one node. The first writes faults of all to ``out``, and at last ``out``/network: the rates.

    Without that file nothing is known: the first node itself may be the one that nobody reaches. A node that did not
    reach it writes NODE.lost.
    """
    choose_interface(os.environ, nodes[0])
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # an all-reduce that fails raises; else it ends the process
    node = node_name()
    try:
        if node != nodes[0]:
            _wait_for_first(out, nodes[0])
        store = dist.TCPStore(nodes[0], port, is_master=node == nodes[0], timeout=MEET, wait_for_workers=False)
        (out / "open").touch()
        _take_part(Meeting.join(store, nodes, node), out)
    except RuntimeError as error:  # torch's errors of network and store
        reason = str(error).splitlines()[0]
        (out / f"{node}.lost").write_text(f"did not meet the others on {nodes[0]}, port {port}: {reason}\n")


def _wait_for_first(out: Path, first: str) -> None:
    """Return once the first node's store is open: who connects to another program there may wait for long."""
    deadline = time.monotonic() + MEET.total_seconds()
    while not (out / "open").exists():
        if (out / f"{first}.lost").exists() or time.monotonic() > deadline:
            raise RuntimeError("it did not open its store")
        time.sleep(0.05)


@dataclass(frozen=True)
class Meeting:
    """The nodes that came."""

    store: dist.Store
    nodes: list[str]
    absent: list[str]
    index: int
    """Of this node."""
    skew: float
    """Seconds that this node's clock is ahead of the first one's, and the moment that an answer took."""

    @classmethod
    def join(cls, store: dist.Store, nodes: Sequence[str], node: str) -> Meeting:
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

    def wait_for_all(self, topic: str) -> list[str]:
        """Return once every node has said something, or after a while; the store's keys, by node."""
        keys = [f"{topic}/{index}" for index in range(len(self.nodes))]
        with contextlib.suppress(dist.DistStoreError):
            self.store.wait(keys, 2 * EXCHANGE)
        return keys

    def hear(self, topic: str) -> list[Any]:
        """What each node said, once all have; None for those that say nothing for too long."""
        keys = self.wait_for_all(topic)
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]


def _take_part(meeting: Meeting, out: Path) -> None:
    node = meeting.nodes[meeting.index]
    facts = json.loads((out / f"{node}.json").read_text())
    meeting.say("facts", {**facts, "skew": meeting.skew})
    meeting.say("links", _try_links(meeting))
    if meeting.index == 0:
        faults, rates = _judge(meeting)
        for bad, found in faults.items():
            write_faults(out, bad, found)
        good = [index for index, node in enumerate(meeting.nodes) if node not in faults]
        meeting.store.set("good", json.dumps(good))
    meeting.store.wait(["good"], 4 * EXCHANGE)
    good = json.loads(meeting.store.get("good"))
    rate = None
    if meeting.index in good and len(good) > 1:
        try:
            rate = all_reduce_rate(meeting.store, good.index(meeting.index), len(good), _device())
        except RuntimeError as error:
            write_faults(out, node, [f"the all-reduce of {len(good)} nodes: {str(error).splitlines()[0]}"])
    meeting.say("all", rate)
    if meeting.index == 0:  # and holds the store until the others have left it
        together = [rate for rate in meeting.hear("all") if rate is not None]
        lines = [f"{meeting.nodes[a]} - {meeting.nodes[b]}: {_gigabytes(rate)}" for (a, b, _), rate in rates]
        lines.append(f"all-reduce of {len(good)} nodes: {_gigabytes(min(together, default=None))}")
        (out / "network").write_text("".join(f"{line}\n" for line in lines))


def _try_links(meeting: Meeting) -> dict[int, float | None]:
    """Bytes per second of this node's links, by their numbers."""
    rates = {}
    all_links = links(len(meeting.nodes))
    for turn in sorted({turn for *_, turn in all_links}):
        for number, (a, b, when) in enumerate(all_links):
            if when == turn and meeting.index in (a, b):
                rates[number] = _exchange(meeting.store, f"link{number}", listens=meeting.index == a)
        meeting.say(f"turn{turn}", True)
        meeting.wait_for_all(f"turn{turn}")  # else who waited for a dead neighbour would keep its other one waiting
    return rates


def _judge(meeting: Meeting) -> tuple[dict[str, list[str]], list[tuple[tuple[int, int, int], float | None]]]:
    """Faults by node, and the rate of each link as its slower end saw it."""
    said = [{} if one is None else one for one in meeting.hear("links")]
    all_links = links(len(meeting.nodes))
    rates = []
    for number, (a, b, _) in enumerate(all_links):
        ends = [said[a].get(str(number)), said[b].get(str(number))]
        rates.append(None if None in ends else min(ends))
    facts = dict(zip(meeting.nodes, meeting.hear("facts"), strict=True))
    faults = compare_nodes({node: one for node, one in facts.items() if one is not None})
    faults |= {node: [f"did not reach {meeting.nodes[0]}"] for node in meeting.absent}
    for node, fault in judge_links(meeting.nodes, rates).items():
        faults.setdefault(node, []).append(fault)
    return faults, list(zip(all_links, rates, strict=True))


def _exchange(store: dist.Store, name: str, *, listens: bool) -> float | None:
    """Bytes per second in each direction between two nodes, over TCP, which fails in time; None if it does."""
    seconds = EXCHANGE.total_seconds()
    try:
        if listens:
            with socket.create_server((_own_address(), 0)) as server:
                store.set(name, json.dumps(server.getsockname()[:2]))
                server.settimeout(seconds)
                connection, _ = server.accept()
        else:
            store.wait([name], EXCHANGE)
            connection = socket.create_connection(json.loads(store.get(name)), timeout=seconds)
        with connection, ThreadPoolExecutor(max_workers=1) as pool:
            connection.settimeout(seconds)
            start = time.perf_counter()
            sent = pool.submit(connection.sendall, bytes(SIZE))
            left, buffer = SIZE, bytearray(1 << 20)
            while left and (count := connection.recv_into(buffer, min(left, len(buffer)))):
                left -= count
            sent.result()
    except (OSError, dist.DistStoreError):
        return None
    return None if left else SIZE / (time.perf_counter() - start)


def _own_address() -> str:
    """This node's address on the interface that ranks are to use."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    return interface_addresses().get(interface, socket.gethostname())


def _device() -> torch.device:
    """The first GPU, or the CPU."""
    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda", 0) if gpu else torch.device("cpu")


def all_reduce_rate(store: dist.Store, rank: int, ranks: int, device: torch.device, *, size: int = SIZE) -> float:
    """Bytes per second that a rank sends, and receives, in an all-reduce of ``size`` bytes; RuntimeError: it failed.

    Over NCCL on GPUs, else over gloo. A single rank sends nothing: 0.
    """
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("all", store),
        rank=rank,
        world_size=ranks,
        timeout=EXCHANGE,
    )
    data = torch.empty(size // 4, device=device)
    best = float("inf")
    for _ in range(3):
        data.fill_(1.0)
        start = time.perf_counter()
        dist.all_reduce(data)
        right = bool((data == ranks).all())  # and waits for the GPU
        best = min(best, time.perf_counter() - start)
        if not right:
            raise RuntimeError("its result is wrong")
    dist.destroy_process_group()
    return 2 * (ranks - 1) / ranks * size / best


def _gigabytes(rate: float | None) -> str:
    return "nothing went through" if rate is None else f"{rate / 1e9:.2f} GB/s"
