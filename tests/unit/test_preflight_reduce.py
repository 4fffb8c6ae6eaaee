"""A node whose all-reduce fails or hangs is named, and the others train without it; real nodes are in tests/cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

NODE = """
import sys, time
from datetime import timedelta
from pathlib import Path
from hive_ds.launch import preflight_meeting, preflight_network as network

names, fault, out, port = sys.argv[1].split(","), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
network.EXCHANGE = preflight_meeting.EXCHANGE = timedelta(seconds=4)
network.REDUCE = timedelta(seconds=8)
reduce, node = network.all_reduce_rate, network.node_name()

def planted(store, rank, ranks, device):
    if fault == "breaks" and node == names[2]:
        raise RuntimeError("unhandled system error")
    if (fault == "hangs" and node == names[2]) or (fault == "crowd" and ranks > 2):
        time.sleep(60)
    return reduce(store, rank, ranks, device)

network.all_reduce_rate = planted
network.check_network(out, names, port)
"""
NAMES = ("localhost", "nodeB", "nodeC")  # they meet on the first


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Files that the network check of three nodes leaves, each a process, by fault; all run at once and mostly wait."""
    folders = {fault: tmp_path_factory.mktemp(fault) for fault in ("breaks", "hangs", "crowd")}
    nodes = [node for fault, folder in folders.items() for node in start(fault, folder)]
    assert {node.wait(200) for node in nodes} == {0}
    return {
        fault: {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".json"}
        for fault, folder in folders.items()
    }


def start(fault: str, folder: Path) -> list[subprocess.Popen[bytes]]:
    for name in NAMES:
        (folder / f"{name}.json").write_text(json.dumps({"versions": {"torch": "2"}}))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", NODE, ",".join(NAMES), fault, str(folder), str(port)]
    return [subprocess.Popen(command, env={**os.environ, "SLURMD_NODENAME": name}) for name in NAMES]


@pytest.mark.parametrize(("fault", "said"), [("breaks", "unhandled system error"), ("hangs", "not through after 8 s")])
def test_the_node_that_cannot_reduce_is_named(left, fault: str, said: str) -> None:
    files = left[fault]
    expected = f"network: no all-reduce with its neighbours, who can with others; in that of all: {said}\n"
    assert {name: text for name, text in files.items() if name.endswith(".fault")} == {"nodeC.fault": expected}
    assert "together" not in files
    assert files["network"].splitlines()[-1].startswith("all-reduce of 2 nodes: ")
    assert files["network"].endswith(" GB/s\n")


def test_nodes_that_cannot_reduce_together_though_pairs_can_are_not_blamed(left) -> None:
    files = left["crowd"]
    assert not [name for name in files if name.endswith(".fault")]
    assert files["together"].startswith("the all-reduce of 3 nodes failed: localhost: ")
    assert files["network"].splitlines()[-1] == "all-reduce of 3 nodes: nothing went through"
