"""Do the nodes reach one another, and how fast: pairs first, so that a bad node has a name, then all at once.

The nodes meet at a key-value store on the first one. Each exchanges data with its two neighbours of a ring, over TCP;
one that cannot, or is far slower than the others, is out, and so is one whose versions, clock or GPUs differ. The rest
does one all-reduce together, over NCCL where there are GPUs. Where that fails everywhere waits, so neighbours do one in
pairs, which tells whose fault it is, and the rest tries again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hive_ds.launch.network import choose_interface, interface_addresses
from hive_ds.launch.preflight import node_name, write_faults
from hive_ds.launch.preflight_meeting import EXCHANGE, MEET, Meeting
from hive_ds.launch.preflight_verdict import compare_nodes, judge_links, links

REDUCE = timedelta(seconds=20)
"""For an all-reduce, a GPU's and NCCL's start in it; after that its process is ended."""
SIZE = 64 << 20
"""Bytes: enough to fill a link, and quick on a slow one."""


def check_network(out: Path, nodes: Sequence[str], port: int) -> None:
    """Take part as one node. The first writes faults of all to ``out``, and at last ``out``/network: the rates.

    Without that file nothing is known: the first node itself may be the one that nobody reaches. A node that did not
    reach it writes NODE.lost. ``out``/together says what nodes cannot do together though none of them is at fault.
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


def _take_part(meeting: Meeting, out: Path) -> None:
    node = meeting.nodes[meeting.index]
    facts = json.loads((out / f"{node}.json").read_text())
    meeting.say("facts", {**facts, "skew": meeting.skew})
    everyone = list(range(len(meeting.nodes)))
    meeting.say("links", _try_links(meeting, everyone, "turn", partial(_exchange, meeting.store)))
    lines: list[str] = []

    def judge() -> list[int]:
        faults, rates = _judge(meeting)
        for bad, found in faults.items():
            write_faults(out, bad, found)
        lines.extend(f"{meeting.nodes[a]} - {meeting.nodes[b]}: {_gigabytes(rate)}" for (a, b, _), rate in rates)
        return [index for index in everyone if meeting.nodes[index] not in faults]

    good = meeting.agree("good", judge)
    rates = _reduce_all(meeting, good, "all")
    if any(isinstance(rate, str) for rate in rates.values()):
        good = _find_those_who_reduce(meeting, rates, out)
        rates = _reduce_all(meeting, good, "again") if good else rates
    if meeting.index == 0:  # and holds the store until the others have left it
        errors = [f"{meeting.nodes[index]}: {rate}" for index, rate in rates.items() if isinstance(rate, str)]
        if errors:
            (out / "together").write_text(f"the all-reduce of {len(rates)} nodes failed: {'; '.join(errors)}\n")
        slowest = min((rate for rate in rates.values() if not isinstance(rate, str)), default=None)
        lines.append(f"all-reduce of {len(good)} nodes: {_gigabytes(None if errors else slowest)}")
        (out / "network").write_text("".join(f"{line}\n" for line in lines))
    meeting.say("left", True)
    if meeting.index == 0:
        meeting.wait_for_all("left")


def _reduce_all(meeting: Meeting, good: Sequence[int], name: str) -> dict[int, float | str]:
    """One all-reduce of the ``good`` nodes: the rate of each, or what went wrong there, on every node."""
    answer: float | str | None = None
    if meeting.index in good and len(good) > 1:
        answer = _reduce_aside(meeting.store, name, good.index(meeting.index), len(good))
    meeting.say(name, answer)

    def collect() -> list[Any]:
        return meeting.hear(name, REDUCE + EXCHANGE)

    said = meeting.agree(f"{name} of all", collect)
    return {index: said[index] or "said nothing" for index in good} if len(good) > 1 else {}


def _find_those_who_reduce(meeting: Meeting, tried: Mapping[int, float | str], out: Path) -> list[int]:
    """Those of the nodes that tried who can take part in an all-reduce, by pairs; none where they all cannot."""
    good = list(tried)

    def reduce_pair(name: str, *, listens: bool) -> float | None:
        rate = _reduce_aside(meeting.store, name, 0 if listens else 1, 2)
        return rate if isinstance(rate, float) else None

    meeting.say("pairs", _try_links(meeting, good, "pairs", reduce_pair, REDUCE + EXCHANGE))

    def judge() -> list[int]:
        said = meeting.hear("pairs", EXCHANGE)
        rates = _slower_ends(len(good), [said[index] for index in good])
        names = [meeting.nodes[index] for index in good]
        # How fast is no matter here: the links have been judged by that.
        faults = judge_links(names, [None if rate is None else 1.0 for rate in rates])
        if len(faults) == len(names):
            return []
        for index, node in zip(good, names, strict=True):
            if node in faults:
                fault = f"no all-reduce with its neighbours, who can with others; in that of all: {tried[index]}"
                write_faults(out, node, [f"network: {fault}"])
        return [index for index, node in zip(good, names, strict=True) if node not in faults]

    return meeting.agree("those who reduce", judge)


def _try_links(
    meeting: Meeting,
    nodes: Sequence[int],
    topic: str,
    attempt: Callable[..., float | None],
    patience: timedelta = 2 * EXCHANGE,
) -> dict[int, float | None]:
    """Bytes per second of this node's links in the ring of ``nodes``, by their numbers; none if it is not in it."""
    rates = {}
    ring = links(len(nodes))
    for turn in sorted({turn for *_, turn in ring}):
        for number, (a, b, when) in enumerate(ring):
            if when == turn and meeting.index in (nodes[a], nodes[b]):
                rates[number] = attempt(f"{topic}-link{number}", listens=meeting.index == nodes[a])
        meeting.say(f"{topic}{turn}", True)
        # Else who waited for a dead neighbour would keep its other one waiting.
        meeting.wait_for_all(f"{topic}{turn}", patience)
    return rates


def _slower_ends(count: int, said: Sequence[dict[str, float | None] | None]) -> list[float | None]:
    """The rate of each link of `links` (``count``), as its slower end saw it."""
    rates = []
    for number, (a, b, _) in enumerate(links(count)):
        ends = [(said[a] or {}).get(str(number)), (said[b] or {}).get(str(number))]
        both = [rate for rate in ends if rate is not None]
        rates.append(min(both) if len(both) == 2 else None)
    return rates


def _judge(meeting: Meeting) -> tuple[dict[str, list[str]], list[tuple[tuple[int, int, int], float | None]]]:
    """Faults by node, and the rate of each link as its slower end saw it."""
    rates = _slower_ends(len(meeting.nodes), meeting.hear("links"))
    facts = dict(zip(meeting.nodes, meeting.hear("facts"), strict=True))
    faults = compare_nodes({node: one for node, one in facts.items() if one is not None})
    faults |= {node: [f"did not reach {meeting.nodes[0]}"] for node in meeting.absent}
    for node, fault in judge_links(meeting.nodes, rates).items():
        faults.setdefault(node, []).append(fault)
    return faults, list(zip(links(len(meeting.nodes)), rates, strict=True))


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


def _reduce_aside(store: dist.TCPStore, name: str, rank: int, ranks: int) -> float | str:
    """`all_reduce_rate` in a process of its own, which can be ended if it hangs; or what went wrong there."""
    fork = multiprocessing.get_context("fork")  # nothing is to be imported again, and this one has used no GPU
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_reduce, args=(sender, store.host, store.port, name, rank, ranks), daemon=True)
    child.start()
    sender.close()
    try:
        waited = receiver.poll(REDUCE.total_seconds())
        return receiver.recv() if waited else f"not through after {REDUCE.total_seconds():.0f} s"
    except EOFError:
        return "its process died"
    finally:
        child.kill()
        child.join()


def _reduce(sender: Connection, host: str, port: int, name: str, rank: int, ranks: int) -> None:
    try:
        store = dist.PrefixStore(name, dist.TCPStore(host, port, is_master=False, timeout=EXCHANGE))
        sender.send(all_reduce_rate(store, rank, ranks, _device()))
    except RuntimeError as error:  # torch's errors of network, GPUs and store
        sender.send(str(error).splitlines()[0])


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
