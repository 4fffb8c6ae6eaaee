"""Hostfiles, the environment file, and what a host's report is checked for, without a second host."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
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
    path.write_text("\ufeff# ours\n\nnode1  slots=8\nnode2 slots=4 # half\n\tnode3\tslots=128\r\n")
    assert read_hostfile(path) == [Host("node1", 8), Host("node2", 4), Host("node3", 128)]


def test_a_file_that_is_no_hostfile_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\n")
    for name, reason in (("nothing", "No such file or directory"), ("binary", "not UTF-8 text")):
        with pytest.raises(HiveError, match=rf"^hostfile .*/{name}: cannot be read \({reason}\); expected lines NAME"):
            read_hostfile(tmp_path / name)


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
    more = {"HIVE_X": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false", "LD_LIBRARY_PATH": "/c"}
    more |= dict.fromkeys(("CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME"), "1")
    more |= dict.fromkeys(("HUGGINGFACE_HUB_CACHE", "OMP_NUM_THREADS", "TORCH_NCCL_BLOCKING_WAIT"), "1")
    more |= dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), "1")
    assert carried_variables(more) == more
    assert carried_variables(dict.fromkeys(("HF_SECRET", "DS_PASSWORD", "HIVE_STOP_AT", "CUDA", "SHELL"), "1")) == {}
    left = {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "x", "WANDB_API_KEY": "x", "HIVE_ATTEMPT": "1"}
    left["LD_LIBRARY_PATH"] = ""
    assert carried_variables(left | kept) == kept
    write_deepspeed_env(tmp_path / "env", kept)
    assert (tmp_path / "env").read_text() == "HF_HOME=/a\nNCCL_DEBUG=INFO\nPATH=/bin\nPYTHONPATH=/b\n"
    for value in ('a"b', "a$b", "a`b", "a\\b", "a\nb", "100%"):
        with pytest.raises(HiveError, match="variable HF_HOME is"):
            write_deepspeed_env(tmp_path / "env", {"HF_HOME": value})


def test_clock_skew_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ssh HOST COMMAND` is this machine itself, seen from one whose clock is a minute ahead."""
    monkeypatch.setattr(hosts, "SSH", ("sh", "-c", 'cd / && eval "$1"'))
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    monkeypatch.setattr(hosts, "DISK", 0)
    monkeypatch.setattr(hosts, "SHM_PER_RANK", 0)
    (unknown,) = hosts.check_hosts([Host("here", 1)], folder=Path("runs"), port=0)
    assert str(unknown).startswith("here: does not know the address of here; write it into /etc/hosts")
    slow = iter([0.0])  # then 9 s until the answer is there, all of which may have passed before the host looked
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(hosts.time, "time", lambda: now() + next(slow, 9.0))
        assert hosts.check_hosts([Host("localhost", 1)], folder=Path("runs"), port=0) == []
    both = [Host("localhost", 1), Host("here", 1)]  # of the first alone the others must know the address
    assert hosts.check_hosts(both, folder=Path("runs"), port=0) == []
    assert hosts.check_hosts([Host("me@localhost", 1)], folder=Path("runs"), port=0) == []
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
        ({"gpus": 0, "cores": 8}, []),
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


def test_what_the_first_host_lacks_is_no_fault_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hosts, "SSH", ("sh", "-c", 'cat > /dev/null; cat "$0.json"'))
    said_by("first", versions={**VERSIONS, "torch": None})
    said_by("second")
    (fault,) = hosts.check_hosts([Host("first", 8), Host("second", 8)], folder=tmp_path)
    assert (fault.host, fault.what) == ("first", "torch is not installed")


@pytest.mark.parametrize(
    ("ssh", "what"),
    [
        ("echo Welcome; echo warning >&2; echo 'no route' >&2; exit 255", "not reachable by ssh: no route"),
        (r"printf 'zur\374ck\n' >&2; exit 255", "not reachable by ssh: zur\ufffdck"),  # in Latin-1
        ("echo 'no such file' >&2; exit 127", "{python} does not run there: no such file"),
        ("cat >/dev/null; echo 'Use sbatch!'", "{python} was not run there: Use sbatch!"),
        ("cat >/dev/null", "{python} was not run there: nothing"),
        ("cat >/dev/null; echo 1796000000", "{python} was not run there: 1796000000"),
        ("cat >/dev/null; echo '{}'", "{python} was not run there: {{}}"),
        ("exec sleep 60", "no answer within 4 s"),
    ],
)
def test_a_host_that_does_not_answer_as_asked(
    ssh: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is said of it, and the others are asked all the same, but not for a port of rank 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        hosts, "SSH", ("sh", "-c", f'[ $0 = first ] || {{ {ssh}; exit; }}; cat >/dev/null; cat "$0.json"')
    )
    said_by("first", gpus=4, port_free=False)
    faults = hosts.check_hosts([Host("second", 8), Host("first", 8)], folder=tmp_path, patience=4)
    assert [(one.host, one.what) for one in faults] == [
        ("second", what.format(python=sys.executable)),
        ("first", "8 slots, but 4 GPUs"),
    ]


def test_a_port_that_is_taken_on_the_first_host_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hosts, "SSH", ("sh", "-c", 'cat > /dev/null; cat "$0.json"'))
    said_by("first", port_free=False)
    (fault,) = hosts.check_hosts([Host("first", 8)], folder=tmp_path, port=29501)
    assert str(fault) == "first: port 29501 is in use; choose another --master_port"


@pytest.mark.parametrize(
    ("ends", "code"), [(("0", "0"), 0), (("never", "1"), 1), (("never", "85"), 85), (("never", "137", "never"), 137)]
)
def test_the_first_host_that_fails_ends_all(ends: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host is called by how it ends; ``never`` is one that waits for its stdin to close."""
    monkeypatch.setattr(hosts, "SSH", ("sh", "-c", "case $0 in never*) cat; exit 9;; *) exit ${0%.*};; esac"))
    named = [Host(f"{end}.{number}", 1) for number, end in enumerate(ends)]
    begun = time.monotonic()
    assert hosts.run_on_hosts(named, []) == code
    assert time.monotonic() - begun < 30


def test_what_each_host_is_told_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    monkeypatch.setattr(hosts, "SSH", ("sh", "-c", 'echo "$1" >"$0"'))
    for name in ("HIVE_ATTEMPT", "HIVE_STOP_AT", "HF_HOME", "HF_TOKEN"):
        monkeypatch.setenv(name, "x y")
    assert hosts.run_on_hosts([Host("me@one", 2), Host("two", 4)], ["--set", "data.train=a b"], port=1234) == 0
    for number, (name, slots) in enumerate([("me@one", "2"), ("two", "4")]):
        words = shlex.split(Path(name).read_text())
        start = words.index(sys.executable)
        assert words[:5] == ["cd", str(tmp_path / "a b"), "&&", "exec", "env"]
        variables = dict(word.split("=", 1) for word in words[5:start])
        assert variables["HIVE_ATTEMPT"] == variables["HIVE_STOP_AT"] == variables["HF_HOME"] == "x y"
        assert "HF_TOKEN" not in variables
        place = ["--nodes", "2", "--node-rank", str(number), "--ranks", slots, "--master", "one", "--port", "1234"]
        launch = ["-m", "hive_ds.launch.node", *place, "--tied", "--", "--set", "data.train=a b"]
        assert words[start + 1 :] == launch


def test_ssh_asks_no_question_and_gives_up_a_silent_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/asked\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert hosts.run_on_hosts([Host("first", 8)], ["--stage", "1"]) == 0
    *options, host, command = (tmp_path / "asked").read_text().splitlines()
    assert dict(zip(options[::2], options[1::2], strict=True)).keys() == {"-o"}
    assert set(options[1::2]) == {"BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5"}
    assert host == "first"
    assert command.endswith("-- --stage 1")


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


def test_the_interface_is_that_with_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = {"node1": "10.1.0.5", "me": "127.0.1.1", "192.0.2.1": "10.2.0.5"}
    monkeypatch.setattr(network, "_source_address", routes.get)
    found = {"usb0": "10.9.0.5", "ib0": "10.1.0.5", "eth0": "10.2.0.5"}
    monkeypatch.setattr(network, "interface_addresses", lambda: found)
    assert interface_towards("node1") == "ib0"
    assert interface_towards("me") == interface_towards("unknown") == "eth0"  # the default route's
    del routes["192.0.2.1"]
    assert interface_towards("me") == "usb0"
    found.clear()
    assert interface_towards("node1") is None


def test_the_interface_is_set_where_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interface_towards", lambda host: {"node1": "bond0"}.get(host))
    env = {"GLOO_SOCKET_IFNAME": "eth1"}
    network.choose_interface(env, "node1")
    assert env == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=bond0"}  # and not bond0.100, say
    nowhere: dict[str, str] = {}
    network.choose_interface(nowhere, "node2")
    assert nowhere == {}
