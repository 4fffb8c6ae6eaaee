"""Rows 15 and 27, and errors of one rank: each ends the job at once, with one message, and a hang resumes."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
from forked import run_forked
from planted import MODULE
from test_train_command import EQUAL_ACROSS_ATTEMPTS
from tiny_run import TinyRun

from hive_ds.constants import EXIT_HUNG, EXIT_STOPPED
from hive_ds.training.hang_report import read_dumps

HOST = socket.gethostname()
TIMEOUT = 10


@pytest.fixture(scope="module")
def undisturbed(tiny: TinyRun) -> None:
    """Stage 1 without a fault."""
    tiny.train_forked(1, "undisturbed")


def hang(tiny: TinyRun, run: str, fault: str, launcher: str) -> str:
    """Train until ``fault`` stops everything in step 6, after a checkpoint; returns what was printed."""
    hung = tiny.train(1, run, "--set", f"training.hang_timeout={TIMEOUT}", launcher=launcher, plant=f"{fault} 6")
    output = hung.stdout + hung.stderr
    assert hung.returncode != 0, output
    last = max(path.stat().st_mtime for path in (tiny.root / run / "stage1" / "hang").iterdir())
    assert time.time() - last < 40, output  # launchers give a stopped rank 30 s
    return output


def check_resumes(tiny: TinyRun, run: str) -> None:
    """The same command ends with DONE and the losses of the undisturbed run."""
    assert "step-000004" in tiny.train_forked(1, run)
    assert (tiny.root / run / "stage1" / "DONE").exists()
    found, expected = (
        [{key: line[key] for key in EQUAL_ACROSS_ATTEMPTS} for line in tiny.metrics(name, 1, "train")]
        for name in (run, "undisturbed")
    )
    assert found == expected


def test_hang_is_dumped_and_gone_on_from(tiny: TinyRun, undisturbed: None) -> None:
    output = hang(tiny, "hung", "sleep_for_ever 1", "torchrun")
    assert f"exitcode:{EXIT_HUNG}" in output.replace(" ", "")
    folder = tiny.root / "hung" / "stage1" / "hang"
    dumps = read_dumps(folder)
    assert sorted(dumps) == [0, 1]
    for dump in dumps.values():
        assert (dump.host, dump.step) == (HOST, 6)
        assert TIMEOUT - 2 < dump.idle < TIMEOUT + 2
    assert (dumps[1].phase, dumps[1].module, dumps[1].in_collective) == ("forward", MODULE, False)
    assert (dumps[0].phase, dumps[0].in_collective) == ("backward", True)  # the weights are small and not partitioned
    assert len({*dumps[0].samples, *dumps[1].samples}) == 4  # two a micro-batch
    times = [(folder / f"rank-{rank:05d}.txt").stat().st_mtime for rank in (0, 1)]
    assert abs(times[0] - times[1]) < 3
    assert "in sleep_for_ever\n" in (folder / "rank-00001.txt").read_text()
    samples = json.dumps(dumps[1].samples)
    verdict = f"the others wait for rank 1 on {HOST}: step 6, forward, module {MODULE}, samples {samples}"
    assert output.count(f"\nhang: {verdict}; dumps in {folder}\n") == 1
    assert (folder / "verdict.txt").read_text() == f"{verdict}\n"
    # This rank also waited for its data, from the first step on.
    slow = [(line["slowest_rank"], line["slowest_by"]) for line in tiny.metrics("hung", 1, "train")]
    assert slow[1:] == [(1, "data")] * (len(slow) - 1)
    assert f"warning: rank 1 on {HOST} is slow in data: a step takes " in output
    check_resumes(tiny, "hung")
    assert read_dumps(folder) == dumps


@pytest.mark.long
def test_stopped_rank_is_named_and_gone_on_from(tiny: TinyRun, undisturbed: None) -> None:
    """Rank 0, which under this launcher keeps the store that ranks talk through."""
    output = hang(tiny, "stopped-rank", "stop_this_process 0", "deepspeed")
    folder = tiny.root / "stopped-rank" / "stage1" / "hang"
    assert list(read_dumps(folder)) == [1]
    assert f"\nhang: no answer from rank 0 on {HOST}: stopped, ended, or cut off" in output
    check_resumes(tiny, "stopped-rank")


KILLED = r"DataLoader worker \(pid \d+\) is killed by signal: Killed\..* lower data\."
ONE_WORKER = ("--set", "data.num_workers=1")


def check_error_of_rank_1(output: str, message: str, planted: Path) -> None:
    """That ``output`` names it, once, and that all ranks have ended soon after the time that ``planted`` holds."""
    ended = time.time()
    (line,) = (line for line in output.splitlines() if line.startswith("error:"))
    where = rf"at step 2, forward, module {re.escape(MODULE)}, samples \[.*\]"
    assert re.fullmatch(rf"error: rank 1 on {HOST}: RuntimeError: {message}.*{where}", line), line
    assert ended - float(planted.read_text()) < 15


def test_error_of_one_rank_is_said_once(tiny: TinyRun) -> None:
    env = tiny.environment() | {"HIVE_PLANT": "kill_a_worker 1 2"}
    done = run_forked("planted:main", tiny.arguments(1, "killed-worker", *ONE_WORKER), env, 2, timeout=240)
    assert done.returncode == 1, done.stderr
    output = done.stdout + done.stderr
    check_error_of_rank_1(output, KILLED, tiny.root / "killed-worker" / "planted")
    assert output.count("Traceback (most recent call last)") == 1, output


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "launcher", "message"),
    [("kill_a_worker", "torchrun", KILLED), ("raise_error", "deepspeed", "planted error;")],
)
def test_error_of_one_rank_ends_all(tiny: TinyRun, fault: str, launcher: str, message: str) -> None:
    done = tiny.train(1, fault, *ONE_WORKER, launcher=launcher, plant=f"{fault} 1 2")
    assert done.returncode == 1, done.stderr
    output = done.stdout + done.stderr
    check_error_of_rank_1(output, message, tiny.root / fault / "planted")
    # One of the ranks'; torchrun adds its own.
    assert output.count("Traceback (most recent call last)") == 1 + (launcher == "torchrun"), output


def test_two_ranks_report_one_line_and_exit_with_two(tiny: TinyRun) -> None:
    wrong = tiny.arguments(1, "wrong", "--set", "stages.connector_pretraining.global_batch_size=7")
    done = run_forked("hive_ds.train:main", wrong, tiny.environment(), 2, timeout=240)
    assert done.returncode == 2, done.stderr
    output = done.stdout + done.stderr
    error = "error: global_batch_size 7 is not divisible by 2 ranks; these rank counts divide it: 1, 7"
    assert output.count(error) == 1
    assert "Traceback" not in output


def test_the_deepspeed_launcher_hands_on_what_ranks_exit_with(tiny: TinyRun, tmp_path: Path) -> None:
    """`hive-ds supervise` goes by it, and scripts that requeue jobs."""
    (tmp_path / "ends.py").write_text(f"raise SystemExit({EXIT_STOPPED})\n")
    launch = tiny.command(1, "ends", module="ends")
    done = subprocess.run(launch, cwd=tmp_path, env=tiny.environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == EXIT_STOPPED, done.stdout + done.stderr
