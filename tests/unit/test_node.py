"""What the launcher of one host asks torchrun for, and how it ends; real ranks are in tests/cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hive_ds.launch import node

PLACE = ["--nodes", "2", "--ranks", "4", "--master", "n1", "--port", "12092"]
TRAIN = ["--set", "data.train=a b"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What torchrun is called with."""
    calls: list[list[str]] = []
    monkeypatch.setattr(node, "torchrun", calls.append)
    return calls


@pytest.mark.parametrize(("given", "cores", "threads"), [(None, 22, "5"), (None, 3, "1"), ("3", 22, "3")])
def test_torchrun_is_asked_for_this_hosts_ranks(
    given: str | None, cores: int, threads: str, asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        del os.environ["OMP_NUM_THREADS"]
    packages = tmp_path / "packages"
    assert node.main([*PLACE, "--node-rank", "1", "--packages", str(packages), "--", *TRAIN]) == 0
    assert not packages.exists()  # the first host writes it
    assert node.main([*PLACE, "--node-rank", "0", "--packages", str(packages), "--", *TRAIN]) == 0
    first, *others = packages.read_text().splitlines()
    assert first.startswith("# Python 3.")
    assert any(line.startswith("torch==") for line in others)
    assert others == sorted(others, key=str.lower)
    meeting = ["--nproc-per-node", "4", "--master-addr", "n1", "--master-port", "12092", "--module", "hive_ds.train"]
    assert asked == [["--nnodes", "2", "--node-rank", number, *meeting, *TRAIN] for number in ("1", "0")]
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_it_ends_with_the_ssh_that_started_it() -> None:
    """When its stdin closes, and not when something comes from there."""
    program = "import time; from hive_ds.launch import node; node.torchrun = lambda _: time.sleep(60);"
    program += f" node.main({[*PLACE, '--node-rank', '0', '--tied', '--', *TRAIN]})"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"a line\n")
        process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(8)  # it imports torch
        process.stdin.close()
        assert process.wait(20) == -signal.SIGTERM


@pytest.mark.parametrize(("exitcode", "code"), [(2, 2), (85, 85), (-9, 137)])
def test_the_exit_code_is_that_of_the_first_rank_that_failed(
    exitcode: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> None:
        late, first = (ProcessFailure(rank, 1, end, "") for rank, end in ((0, 1), (3, exitcode)))
        late.timestamp, first.timestamp = 20, 10
        raise ChildFailedError("train", {0: late, 3: first})

    monkeypatch.setattr(node, "torchrun", fail)
    assert node.main([*PLACE, "--node-rank", "0", "--", *TRAIN]) == code
    assert f"rank 3 was the first to end, with exit code {code}\n" in capsys.readouterr().err
