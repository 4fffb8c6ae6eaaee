"""Hostfiles, the environment file, and what a host's report is checked for, without a second host."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from hive_ds.errors import HiveError
from hive_ds.launch import hosts
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


def test_interface_is_one_of_this_host() -> None:
    names = interface_addresses()
    assert "lo" not in names
    assert interface_towards("127.0.0.1") in {*names, None}
