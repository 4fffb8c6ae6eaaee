"""Row 27: the watchdog by itself. `test_faults` has it in the trainer."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from forked import start_rank
from torch.distributed import TCPStore
from watchdog_ranks import FAULTS, TIMEOUT

from hive_ds.constants import EXIT_HUNG
from hive_ds.errors import HiveError
from hive_ds.training import faults
from hive_ds.training.distributed import World, current_store, start, stop
from hive_ds.training.hang_report import Dump, free_folder, read_dumps, verdict, write_dump
from hive_ds.training.place import here
from hive_ds.training.watchdog import ANSWER_SECONDS, Watchdog, longest_wait

PLACE = {"step": 7, "phase": "forward", "module": "layers.3.mlp", "samples": ["a", "b"], "marks": 40}
WAITING = Dump(rank=0, idle=5.0, host="one", pid=1, in_collective=True, **PLACE)  # type: ignore[arg-type]


def start_ranks(fault: str, folder: Path, size: int) -> list[tuple[ForkServerProcess, Path]]:
    """Each with the file of what it prints."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    env = {**os.environ, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments, ranks = [fault, str(folder / fault)], []
    for rank in range(size):
        output = folder / f"{fault}-{rank}.txt"
        variables = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append((start_rank("watchdog_ranks:main", arguments, variables, [output, output]), output))
    return ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each fault's dumps."""
    return tmp_path_factory.mktemp("hangs")


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[str, list[tuple[int | None, str]]]:
    """Exit code and output of each rank, by fault; all run at once, for they mostly wait."""
    runs = {fault: start_ranks(fault, folder, 1 if fault == "was_stopped" else 2) for fault in FAULTS}
    results = {}
    for fault, ranks in runs.items():
        found = []
        for rank, output in reversed(ranks):
            if found and fault in ("is_stopped", "lacks_a_gpu"):  # nobody else ends it
                rank.kill()
            rank.join(120)
            found.append((rank.exitcode, output.read_text()))  # None: not through
        results[fault] = found[::-1]
    for rank, _ in itertools.chain.from_iterable(runs.values()):
        rank.kill()
    return results


@pytest.mark.parametrize("fault", ["is_stopped", "keeps_the_lock"])
def test_rank_that_cannot_answer_is_named(fault: str, folder: Path, ends: dict[str, list[tuple[int, str]]]) -> None:
    (silent, silent_output), (code, output) = ends[fault]
    assert code == EXIT_HUNG, output
    assert f"hang: no answer from rank 0 on {socket.gethostname()}: stopped" in output
    (dump,) = read_dumps(folder / fault).values()
    assert (dump.rank, dump.step, dump.phase, dump.in_collective) == (1, 2, "data", True)
    assert TIMEOUT <= dump.idle < TIMEOUT + 2
    assert "in barrier\n" in (folder / fault / "rank-00001.txt").read_text()
    if fault == "keeps_the_lock":  # C code ends it, with its stack
        assert silent == 1
        assert "in keeps_the_lock" in silent_output
    else:
        assert silent == -signal.SIGKILL


def test_rank_that_cannot_write_ends_too(ends: dict[str, list[tuple[int, str]]]) -> None:
    (code, output), (other, other_output) = ends["cannot_write"]
    assert (code, other) == (EXIT_HUNG, EXIT_HUNG)
    assert "hang: rank 0 on " in output
    assert "does not wait for other ranks" in output
    assert "hang: no answer from rank 0 on " in other_output


def test_stopped_and_let_go_on_is_no_hang(ends: dict[str, list[tuple[int, str]]]) -> None:
    """Nor is a first step that takes longer than the timeout."""
    ((code, output),) = ends["was_stopped"]
    assert code == 0
    assert output.endswith("over\n")
    assert "hang" not in output


def test_missing_gpu_is_said_by_the_rank_that_misses_it(ends: dict[str, list[tuple[int, str]]]) -> None:
    _, (code, output) = ends["lacks_a_gpu"]
    assert code == 2
    wanted = f"error (rank 1): 2 ranks on {socket.gethostname()}, but rank 1 sees 1 GPUs: start one rank a GPU"
    (line,) = [line for line in output.splitlines() if "rank" in line]
    assert line.startswith(wanted)


def test_verdict() -> None:
    hosts = ["one", "two", "three"]
    dumps = {rank: replace(WAITING, rank=rank, host=host) for rank, host in enumerate(hosts)}
    where = 'step 7, forward, module layers.3.mlp, samples ["a", "b"]'
    assert verdict(dumps, hosts) == f"all ranks are at the same place, {where}: the network, or the same fault on all"
    behind = {**dumps, 1: replace(dumps[1], marks=39, phase="data")}
    assert verdict(behind, hosts) == f"the others wait for rank 1 on two: {where.replace('forward', 'data')}"
    busy = {**behind, 2: replace(dumps[2], in_collective=False)}
    assert verdict(busy, hosts) == f"the others wait for rank 2 on three: {where}"
    on_gpus = {0: dumps[0], 1: replace(behind[1], in_collective=False), 2: busy[2]}  # rank 2 waits for its own GPU
    assert verdict(on_gpus, hosts) == verdict(behind, hosts)
    silent = {0: dumps[0], 2: busy[2]}
    assert verdict(silent, hosts).startswith("no answer from rank 1 on two: stopped, ended, or cut off")
    many = verdict({0: dumps[0]}, ["one"] * 20)
    assert "rank 8 on one and 11 more" in many
    assert verdict({0: dumps[0]}, ["one"]) == f"the only rank hangs: {where}"


def test_dump_is_read_as_written_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "hang"
    write_dump(folder, WAITING)
    text = (folder / "rank-00000.txt").read_text()
    assert text.count("in test_dump_is_read_as_written_and_kept") == 2  # with source lines, and by faulthandler
    assert read_dumps(folder) == {0: WAITING}
    for name in ("hang-2", "hang-3"):
        assert free_folder(folder) == tmp_path / name
        write_dump(tmp_path / name, WAITING)


def test_a_hang_is_dumped_where_nothing_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of the log may be full, or the terminal gone."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    Watchdog(tmp_path, 0, ["one"], 5.0, None)._report(7.0)
    monkeypatch.undo()
    (dump,) = read_dumps(tmp_path).values()
    assert (dump.rank, dump.idle) == (0, 7.0)
    assert (tmp_path / "verdict.txt").read_text().startswith("the only rank hangs: step ")


def test_groups_made_later_wait_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed makes groups of its own, and says nothing of timeouts."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # so that it is put back afterwards
    start(World(), longest_wait(1800))
    try:
        group = torch.distributed.new_group([0])
        timeout = group._get_backend(torch.device("cpu")).options._timeout
    finally:
        stop()
    assert timeout.total_seconds() > 2 * 1800 + ANSWER_SECONDS


def test_switched_off_and_stopped(tmp_path: Path) -> None:
    assert current_store() is None
    off = Watchdog(tmp_path, 0, ["one"], 0, None)
    off.start()
    off.stop()
    on = Watchdog(tmp_path, 0, ["one"], 0.2, None)
    on.start()
    for _ in range(10):  # longer than the timeout, but something moves
        here.enter("data")
        time.sleep(0.1)
    on.stop()
    time.sleep(0.5)  # nothing moves, and nobody watches


def test_before_ranks_have_met_rank_0_speaks_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first rank that ends takes the others along: rank 1 gives rank 0 the time to say what is wrong."""
    waited: list[float] = []
    monkeypatch.setattr("hive_ds.training.faults.time.sleep", waited.append)
    faults.report_error(HiveError("wrong"), World(), debug=False)
    assert (capsys.readouterr().err, waited) == ("error: wrong\n", [])
    # Still there after that: rank 0 had not read what this one has.
    faults.report_error(HiveError("wrong"), World(rank=1, size=2), debug=False)
    assert (capsys.readouterr().err, waited) == ("error (rank 1): wrong\n", [10.0])


def test_a_taken_port_is_said_with_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with pytest.raises(RuntimeError) as caught:
            TCPStore("127.0.0.1", taken.getsockname()[1], is_master=True)
    faults.report_crash(caught.value, World(), "start")
    *_, line = capsys.readouterr().err.splitlines()
    assert re.match(
        r"error: rank 0 .*EADDRINUSE.* \(another program of this host has the port; give .*--master_port N\)", line
    )
