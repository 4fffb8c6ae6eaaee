"""What a host says about itself."""

from __future__ import annotations

import fnmatch
import json
import os
import socket
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from hive_ds.launch import probe


def test_a_port_is_free_where_nobody_listens() -> None:
    """Also where a connection to it has just ended, which the kernel remembers for a minute."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert not probe.port_is_free(port)
        with socket.create_connection(("127.0.0.1", port)) as there:
            here, _ = server.accept()
            here.close()
            assert there.recv(1) == b""
    assert probe.port_is_free(port)


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    devices = ["/dev/nvidia0", "/dev/nvidia12", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-caps"]
    monkeypatch.setattr(probe.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    monkeypatch.setattr(probe, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda pid: {0, 3, 5})
    with socket.create_server(("", 0)) as server:
        probe.main(server.getsockname()[1], str(tmp_path / "none"), "nobody.invalid")
    report = json.loads(capsys.readouterr().out)
    python = ".".join(map(str, sys.version_info[:3]))
    assert abs(report.pop("time") - time.time()) < 60
    assert report.pop("shm_free") > 0
    assert report == {
        "versions": {"python": python, "torch": version("torch"), "no-such-package": None},
        "gpus": 2,
        "cores": 3,
        "port_free": False,
        "disk_free": None,
        "master_known": False,
    }


def test_free_bytes_are_those_of_the_folders_disk(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    assert probe.free(str(tmp_path)) == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.05)
