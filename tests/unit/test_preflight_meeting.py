"""Nodes that meet at a store and try their links, each a thread; real nodes are in tests/cluster/test_preflight.py."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hive_ds.launch import preflight_meeting, preflight_network
from hive_ds.launch.preflight_meeting import Meeting

Store = Callable[[], dist.TCPStore]


@pytest.fixture
def store() -> Store:
    """Connects one more node to the store of all."""
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    return lambda: dist.TCPStore("127.0.0.1", first.port, is_master=False, timeout=timedelta(seconds=30))


def together(*nodes: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(nodes)) as pool:
        return [one.result() for one in [pool.submit(node) for node in nodes]]


def meet(store: Store, names: list[str], came: list[str]) -> list[Meeting]:
    return together(*(lambda name=name: Meeting.join(store(), names, name) for name in came))


def test_who_does_not_come_is_absent_and_who_comes_late_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_meeting, "MEET", timedelta(seconds=4))
    first, last = meet(store, ["a", "b", "c"], ["a", "c"])
    assert (first.nodes, first.absent, first.index) == (["a", "c"], ["b"], 0)
    assert (last.nodes, last.absent, last.index) == (["a", "c"], ["b"], 1)
    assert max(abs(first.skew), abs(last.skew)) < 5
    with pytest.raises(RuntimeError, match=r"^2 of 3 came in time: a, c$"):
        Meeting.join(store(), ["a", "b", "c"], "b")


def test_a_node_alone_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_meeting, "MEET", timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"^1 of 2 came in time: a$"):
        Meeting.join(store(), ["a", "b"], "a")


def test_the_skew_of_a_clock_is_that_to_the_first_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store().set("came", f'[["a", "b"], {time.time() - 60}]')
    late = Meeting.join(store(), ["a", "b"], "b")
    assert late.skew == pytest.approx(60, abs=5)


def test_what_nodes_say_is_heard_and_silence_is_none(store: Store) -> None:
    first, last = meet(store, ["a", "b"], ["a", "b"])
    last.say("links", {"0": 1.5})
    assert first.hear("links", timedelta(seconds=0.1)) == [None, {"0": 1.5}]
    first.say("links", [])
    assert last.hear("links") == [[], {"0": 1.5}]
    assert together(lambda: last.agree("good", lambda: 1 / 0), lambda: first.agree("good", lambda: "first")) == [
        "first",
        "first",
    ]


def test_data_goes_both_ways_and_a_neighbour_that_does_not_answer_is_none(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_network, "SIZE", 3 << 20)
    monkeypatch.setattr(preflight_network, "_own_address", lambda: "127.0.0.1")
    exchange = preflight_network._exchange
    both = together(lambda: exchange(store(), "x", listens=True), lambda: exchange(store(), "x", listens=False))
    assert all(rate > 1e6 for rate in both)
    monkeypatch.setattr(preflight_network, "EXCHANGE", timedelta(seconds=0.2))
    alone = together(lambda: exchange(store(), "y", listens=True), lambda: exchange(store(), "z", listens=False))
    assert alone == [None, None]


def test_a_neighbour_that_stops_half_way_is_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_network, "SIZE", 1000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        store().set("x", json.dumps(server.getsockname()[:2]))

        def stop() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(bytes(500))
                connection.recv(1000, socket.MSG_WAITALL)

        found, _ = together(lambda: preflight_network._exchange(store(), "x", listens=False), stop)
    assert found is None


def test_the_rate_of_a_link_is_that_of_its_slower_end() -> None:
    """A link whose one end says nothing carried nothing."""
    said = [{"0": 3.0, "2": 5.0}, {"0": 2.0, "1": None}, None]
    assert preflight_network._slower_ends(3, said) == [2.0, None, None]


def test_all_that_is_wrong_with_a_node_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that did not come, of one whose clock and links are off, and of one that says nothing."""
    monkeypatch.setattr(preflight_meeting, "MEET", timedelta(seconds=4))
    a, b, c, d = meet(store, ["a", "b", "c", "d", "e"], ["a", "b", "c", "d"])
    facts = {"versions": {"torch": "2"}, "skew": 0.0}
    for node, own in ((a, facts), (b, {**facts, "skew": 60.0}), (c, facts)):
        node.say("facts", own)
    d.store.set("facts/3", "null")
    rates = {0: (a, b, None), 1: (b, c, None), 2: (c, d, 4e9), 3: (d, a, 5e9)}
    for node in (a, b, c, d):
        node.say("links", {number: rate for number, (one, other, rate) in rates.items() if node in (one, other)})
    faults, found = preflight_network._judge(a)
    assert faults == {
        "b": [
            "its clock is +60 s off the others'",
            "network: a not reached and c not reached; the median is 4.50 GB/s",
        ],
        "e": ["did not reach a"],
    }
    assert found == [((0, 1, 0), None), ((1, 2, 1), None), ((2, 3, 0), 4e9), ((3, 0, 1), 5e9)]


def test_the_rate_of_an_all_reduce_counts_what_a_rank_sends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 (N - 1) / N of the data, in the best of three; one whose sum is wrong fails."""
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **more: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda data: data.mul_(4))
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(preflight_network.time, "perf_counter", lambda: next(clock))
    cpu = torch.device("cpu")
    assert preflight_network.all_reduce_rate(store(), 0, 4, cpu, size=4000) == 2 * 3 / 4 * 4000 / 2
    clock = iter([0.0, 1.0])
    with pytest.raises(RuntimeError, match="its result is wrong"):
        preflight_network.all_reduce_rate(store(), 0, 3, cpu, size=4000)


def test_a_node_listens_on_the_interface_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_network, "interface_addresses", lambda: {"eth0": "10.0.0.1", "ib0": "10.1.0.1"})
    monkeypatch.setattr(preflight_network.socket, "gethostname", lambda: "node1")
    for name, address in (("ib0", "10.1.0.1"), ("eth0,ib0", "10.0.0.1"), ("usb0", "node1"), ("", "node1")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
        assert preflight_network._own_address() == address
