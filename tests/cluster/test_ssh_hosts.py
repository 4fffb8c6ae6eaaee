"""Hosts without Slurm: `hive-ds hosts`, and both ways to train on the hosts of a hostfile."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from minicluster import wait_for
from site_clone import REPOSITORY
from ssh_hosts import Hosts
from tiny_run import TinyRun

pytestmark = pytest.mark.cluster
LAUNCHERS = ("deepspeed", "hosts run")


@pytest.fixture(scope="module")
def room(hosts: Hosts) -> str:
    """A folder of both hosts with room for checkpoints, however full this machine's disk is."""
    folder = hosts.folder / "room"
    folder.mkdir()
    for node in ("node1", "node2"):  # takes no memory until something is written
        hosts.cluster.run("mount", "-t", "tmpfs", "-o", "size=32g", "room", str(folder), node=node)
    return str(folder)


def test_check_finds_what_is_wrong(hosts: Hosts, room: str, tmp_path: Path) -> None:
    good = hosts.hive_ds("hosts", "check", hosts.hostfile("node1 slots=1", "node2 slots=1"), "--folder", room)
    assert (good.returncode, good.stdout) == (0, "2 hosts, 2 slots: no fault found\n"), good.stderr
    hosts.cluster.run("mount", "-o", "remount,size=64m", "/dev/shm", node="node2")
    file = hosts.hostfile("node1 slots=1", "node2 slots=99", "node9 slots=1")
    with hosts.cluster.listening("node1", 29500):
        bad = hosts.hive_ds("hosts", "check", file, "--folder", str(tmp_path))
    hosts.cluster.run("mount", "-o", "remount,size=2g", "/dev/shm", node="node2")
    assert bad.returncode == 1
    cores = len(os.sched_getaffinity(0))
    expected = {
        "node9: not reachable by ssh: ",
        "node1: port 29500 is in use; choose another --master_port",
        f"node1: cannot write to {tmp_path}; it must be the same shared folder on every host",
        f"node2: cannot write to {tmp_path}; it must be the same shared folder on every host",
        f"node2: 99 slots, but no GPU and {cores} cores",
        "node2: /dev/shm has 0.07 GB; expected 24.8 GB for 99 slots",
    }
    lines = bad.stdout.splitlines()
    assert len(lines) == len(expected), bad.stdout
    assert all(any(line.startswith(start) for line in lines) for start in expected), bad.stdout


def test_doctor_says_what_to_do_about_hosts(hosts: Hosts, room: str) -> None:
    """One look at two real hosts: a clock a minute ahead, little shared memory, one that is not there."""
    hosts.cluster.run("mount", "-o", "remount,size=64m", "/dev/shm", node="node2")
    file = hosts.hostfile("node1 slots=1", "node2 slots=1", "node9 slots=1")
    with hosts.clock_ahead("node2", 60):
        done = hosts.hive_ds("doctor", "--json", "--hostfile", file, "--run", room)
    hosts.cluster.run("mount", "-o", "remount,size=2g", "/dev/shm", node="node2")
    assert done.returncode == 1, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["seconds"] < 60
    found = [one for one in said["findings"] if one["area"] == "hosts"]
    assert [(one["name"], one["status"]) for one in found if one["status"] == "ok"] == [("node1", "ok")]
    problems = {(one["name"], one["said"].split(";")[0].split(":")[0]): one["advice"] for one in found if one["advice"]}
    clock = next(what for name, what in problems if "clock" in what)
    assert re.fullmatch(r"its clock is \+(5\d|60) s off this host's", clock)
    assert set(problems) == {("node2", "/dev/shm has 0.07 GB"), ("node2", clock), ("node9", "not reachable by ssh")}
    assert "time service" in problems["node2", clock]
    assert "ssh node9 true" in problems["node9", "not reachable by ssh"]


def test_environment_file(hosts: Hosts) -> None:
    done = hosts.hive_ds("hosts", "env", hosts.hostfile("node1 slots=1", "", "# node3 slots=1", "node2 slots=1"))
    assert done.returncode == 0, done.stderr
    lines = (hosts.folder / ".deepspeed_env").read_text().splitlines()
    assert f"PYTHONPATH={REPOSITORY}" in lines
    assert "HIVE_CARRIED=two words" in lines
    assert "HIVE_ATTEMPT=mine" not in lines
    assert all("=" in line and not line.startswith("#") for line in lines)


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_rank_ends_all(hosts: Hosts, tiny: TinyRun, launcher: str, tmp_path: Path) -> None:
    run = f"killed-{launcher.split()[0]}"
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(hosts.train(launcher, tiny, run, slots=2), stdout=output, stderr=output)
        latest = tiny.root / run / "stage1" / "latest"
        wait_for(lambda: latest.exists() or process.poll() is not None, 240, "a checkpoint")
        assert process.poll() is None, (tmp_path / "output").read_text()
        victim = hosts.cluster.run("pgrep", "-f", "[p]ython[0-9.]* -u -m hive_ds.train", node="node2").split()[-1]
        environment = hosts.cluster.run("cat", f"/proc/{victim}/environ", node="node2")
        assert "HIVE_CARRIED=two words" in environment.split("\0")
        assert ("HIVE_ATTEMPT=mine" in environment.split("\0")) == (launcher == "hosts run")
        hosts.cluster.run("kill", "-9", victim, node="node2")
        killed = time.monotonic()
        wait_for(lambda: not hosts.ranks("node1") and not hosts.ranks("node2"), 100, "the end of all", every=0.2)
        assert process.wait(timeout=60) != 0
        seconds = time.monotonic() - killed
    print(f"{launcher}: all ended after {seconds:.1f} s")
    assert seconds < 15, (tmp_path / "output").read_text()
