"""Hostfiles, the environment file, and what a host's report is checked for, without a second host."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hive_ds.errors import HiveError
from hive_ds.launch import hosts, network
from hive_ds.launch.hostfile import Host, carried_variables, read_hostfile, write_deepspeed_env
from hive_ds.launch.network import interface_addresses, interface_towards


def test_hostfile_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# ours\n\nnode1  slots=8\nnode2 slots=4 # half\n")
    assert read_hostfile(path) == [Host("node1", 8), Host("node2", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1\n", r"line 1: 'node1'; expected NAME slots=N"),
        ("node1 slots=0\n", r"line 1: 'node1 slots=0'"),
        ("node1 slots=1\nnode1 slots=1\n", r"line 2: host node1 is there twice"),
        ("\n# none\n", r"holds no host"),
    ],
)
def test_wrong_hostfile_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(HiveError, match=message):
        read_hostfile(tmp_path / "hostfile")


def test_what_is_carried(tmp_path: Path) -> None:
    kept = {"HF_HOME": "/a", "NCCL_DEBUG": "INFO", "PATH": "/bin", "PYTHONPATH": "/b"}
    left = {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "x", "WANDB_API_KEY": "x", "HIVE_ATTEMPT": "1"}
    left["LD_LIBRARY_PATH"] = ""
    assert carried_variables(left | kept) == kept
    write_deepspeed_env(tmp_path / "env", kept)
    assert (tmp_path / "env").read_text() == "HF_HOME=/a\nNCCL_DEBUG=INFO\nPATH=/bin\nPYTHONPATH=/b\n"
    for value in ('a"b', "a$b", "a\nb", "100%"):
        with pytest.raises(HiveError, match="variable HF_HOME is"):
            write_deepspeed_env(tmp_path / "env", {"HF_HOME": value})


def test_clock_skew_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ssh HOST COMMAND` is this machine itself, seen from one whose clock is a minute ahead."""
    monkeypatch.setattr(hosts, "SSH", ("sh", "-c", 'eval "$1"'))
    monkeypatch.setattr(hosts, "DISK", 0)
    monkeypatch.setattr(hosts, "SHM_PER_RANK", 0)
    (unknown,) = hosts.check_hosts([Host("here", 1)], folder=tmp_path, port=0)
    assert str(unknown).startswith("here: does not know the address of here; write it into /etc/hosts")
    now = time.time
    monkeypatch.setattr(hosts.time, "time", lambda: now() + 60)
    found = hosts.check_hosts([Host("localhost", 1)], folder=tmp_path, port=0)
    assert len(found) == 1
    assert re.fullmatch(
        r"localhost: its clock is -(5\d|60) s off this host's", f"{found[0].host}: {found[0].what}"
    )  # less the round trip


VERSIONS = {"python": "3.11.2", "torch": "2.9.0"}


def said_by(host: str, **changes: Any) -> None:
    """What the host answers to `check_hosts`; sound but for ``changes``."""
    sound = {"versions": VERSIONS, "gpus": 8, "cores": 64, "port_free": True, "master_known": True}
    values = {**sound, "shm_free": 10e9, "disk_free": 10e12, "time": time.time(), **changes}
    Path(f"{host}.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"port_free": False}, []),  # of the first host alone
        ({"gpus": 4}, ["8 slots, but 4 GPUs; write slots=4 in the hostfile"]),
        ({"gpus": 0}, []),
        (
            {"gpus": 0, "cores": 7},
            ["8 slots, but no GPU and 7 cores; write slots=7 in the hostfile, or load its GPU driver"],
        ),
        ({"shm_free": 2e9}, []),
        ({"shm_free": 1.99e9}, [f"/dev/shm has 1.99 GB; expected 2.0 GB for 8 slots; {hosts.SHM_ADVICE}"]),
        ({"disk_free": 20e9}, []),
        ({"disk_free": 19e9}, ["{folder} has 19.00 GB free; expected 20 GB; make room, or name another folder"]),
        ({"disk_free": None}, ["cannot write to {folder}; it must be the same shared folder on every host"]),
        ({"versions": {**VERSIONS, "torch": "2.8"}}, ["torch is 2.8, but 2.9.0 on first; install the same version"]),
        (
            {"versions": {**VERSIONS, "torch": None}},
            ["torch is not installed; install it there, or hive-ds's environment at the same path"],
        ),
    ],
)
def test_what_a_host_lacks_is_named(
    changes: dict[str, Any], faults: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hosts, "SSH", ("sh", "-c", 'cat > /dev/null; cat "$0.json"'))
    said_by("first")
    said_by("second", **changes)
    found = hosts.check_hosts([Host("first", 8), Host("second", 8)], folder=tmp_path)
    assert [str(fault) for fault in found] == [f"second: {fault.format(folder=tmp_path)}" for fault in faults]


def test_a_port_that_is_taken_on_the_first_host_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hosts, "SSH", ("sh", "-c", 'cat > /dev/null; cat "$0.json"'))
    said_by("first", port_free=False)
    (fault,) = hosts.check_hosts([Host("first", 8)], folder=tmp_path, port=29501)
    assert str(fault) == "first: port 29501 is in use; choose another --master_port"


@pytest.mark.parametrize(("ends", "code"), [(("0", "0"), 0), (("never", "85"), 85), (("never", "137", "never"), 137)])
def test_the_first_host_that_fails_ends_all(ends: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host is called by how it ends."""
    monkeypatch.setattr(hosts, "SSH", ("sh", "-c", "case $0 in never*) exec sleep 60;; *) exit ${0%.*};; esac"))
    named = [Host(f"{end}.{number}", 1) for number, end in enumerate(ends)]
    begun = time.monotonic()
    assert hosts.run_on_hosts(named, []) == code
    assert time.monotonic() - begun < 30


def test_without_an_ssh_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "SSH", ("no-such-client",))
    message = "no-such-client: not found; install an ssh client"
    with pytest.raises(HiveError, match=message):
        hosts.check_hosts([Host("first", 8)], folder=tmp_path)
    with pytest.raises(HiveError, match=message):
        hosts.run_on_hosts([Host("first", 8)], [])


def test_interface_is_one_of_this_host() -> None:
    names = interface_addresses()
    assert "lo" not in names
    assert interface_towards("127.0.0.1") in {*names, None}


def test_the_interface_is_set_where_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interface_towards", lambda host: {"node1": "bond0"}.get(host))
    env = {"GLOO_SOCKET_IFNAME": "eth1"}
    network.choose_interface(env, "node1")
    assert env == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=bond0"}  # and not bond0.100, say
    nowhere: dict[str, str] = {}
    network.choose_interface(nowhere, "node2")
    assert nowhere == {}
