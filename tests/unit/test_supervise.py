"""The supervisor's rules, on shell scripts that end as a trainer would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from hive_ds.children import processes_with
from hive_ds.errors import HiveError
from hive_ds.launch.supervise import Supervisor, stage_folder, stop_patience

TRAINER = """
echo $HIVE_ATTEMPT >> tries
set -- {tries}
shift $(( $(wc -l < tries) - 1 ))
case $1 in
saves*) printf step-$(wc -l < tries) > latest; exit ${{1#saves}} ;;
done*) touch DONE; exit ${{1#done}} ;;
stop) touch STOP; exit 1 ;;
orphan) setsid sleep 1000 & echo $! > orphan; exit 1 ;;
killed) kill -9 $$ ;;
*) exit $1 ;;
esac
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def supervise(tries: str) -> tuple[int, int]:
    """Exit code, and number of tries, of which each ends as ``tries`` says."""
    command = ["sh", "-c", TRAINER.format(tries=tries)]
    code = Supervisor(command, Path(), restarts=10, failures=3, pause=0).run()
    names = Path("tries").read_text().splitlines() if Path("tries").exists() else []
    assert len(set(names)) == len(names)
    return code, len(names)


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        ("done0", (0, 1)),
        ("saves1 87 saves1 killed done0", (0, 5)),
        ("done1", (0, 1)),  # srun, for one, may fail after the ranks have ended well
        ("0 0 0 0", (1, 3)),  # no DONE: it did not work, whatever it says
        ("1 2 done0", (2, 2)),
        ("saves1 2 done0", (0, 3)),  # it had the right input before: a disk or a server has failed
        ("saves1 2 2 2 2 done0", (1, 3)),
        ("saves2 done0", (2, 1)),
        ("1 127 done0", (2, 2)),
        ("saves1 127 done0", (2, 2)),  # no such program, whatever there was before
        ("126 done0", (2, 1)),
        ("1 85 done0", (85, 2)),
        ("stop done0", (85, 1)),  # torchrun hides the exit code
        ("1 1 1 done0", (1, 3)),
        ("saves1 1 saves1 1 saves1 1 done0", (0, 7)),
        ("saves1 1 1 done0", (1, 3)),
        ("saves1 saves1 saves1 saves1 saves1 saves1 saves1 saves1 saves1 saves1 saves1 done0", (1, 11)),
        ("orphan done0", (0, 2)),
    ],
)
def test_how_tries_end(tries: str, expected: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(tries) == expected
    assert ("ended with exit code 137 before" in capsys.readouterr().out) == ("killed" in tries)  # as a shell counts
    if tries.startswith("orphan"):
        command = Path(f"/proc/{Path('orphan').read_text().strip()}/cmdline")
        assert not command.exists() or not command.read_text()  # empty: dead, and its parent has not asked yet


def test_what_is_done_is_not_started(capsys: pytest.CaptureFixture[str]) -> None:
    Path("DONE").touch()
    assert supervise("1") == (0, 0)
    assert "is done already" in capsys.readouterr().out


def test_no_such_program() -> None:
    with pytest.raises(HiveError, match=r"nothing-like-this: cannot be started \(No such file"):
        Supervisor(["nothing-like-this"], Path(), restarts=1, failures=1, pause=0).run()


@pytest.mark.parametrize(
    ("signals", "answers", "code"),
    [
        (["SIGUSR1"], True, 85),
        (["SIGTERM"], True, 85),
        (["SIGINT"], True, 85),
        (["SIGTERM", "SIGUSR1", "SIGTERM"], False, 85),
        (["SIGTERM", "SIGUSR1", "SIGHUP"], True, 85),  # only a second SIGTERM or SIGINT ends it
        (["SIGHUP"], True, 85),  # the terminal has gone
    ],
)
def test_signals_ask_for_a_stop(signals: list[str], answers: bool, code: int) -> None:
    """A stop file that an earlier run left does not end the new one; the trainer's answer to a signal does."""
    Path("STOP").touch()
    trainer = "echo $HIVE_ATTEMPT > started; while [ ! -e STOP ]; do sleep 0.02; done; touch seen; " + (
        "sleep 0.2; touch saved; exit 85" if answers else "sleep 1000"
    )
    main = "import sys; from hive_ds.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "supervise", "--folder", ".", "--", "sh", "-c", trainer]
    # Not under nohup, which these tests may be; in the background a script's commands are told to ignore Ctrl-C.
    started_in_background = partial(
        list, map(signal.signal, (signal.SIGHUP, signal.SIGINT), (signal.SIG_DFL, signal.SIG_IGN))
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=started_in_background) as process:
        wait_for("started")
        assert not Path("STOP").exists()
        for name in signals:
            process.send_signal(getattr(signal, name))
            wait_for("seen")
        output, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert Path("saved").exists() == answers
    assert f"{signals[0]}: asking the trainer to save and stop" in output
    assert processes_with("HIVE_ATTEMPT", Path("started").read_text().strip()) == []


def test_a_trainer_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVE_STOP_PATIENCE", "0.5")
    begun = time.monotonic()
    command = ["sh", "-c", "kill -USR1 $PPID; sleep 1000"]
    assert Supervisor(command, Path("runs/stage1"), restarts=1, failures=1, pause=0).run() == 85
    assert Path("runs/stage1/STOP").exists()  # the trainer had not made the folder yet
    assert 0.5 <= time.monotonic() - begun < 60


@pytest.mark.parametrize("given", ["8m", "-1", "nan"])
def test_a_patience_that_is_none_is_refused_before_the_first_try(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noticed at a signal, it would end the trainer before that has saved."""
    monkeypatch.setenv("HIVE_STOP_PATIENCE", given)
    with pytest.raises(HiveError, match=f"^HIVE_STOP_PATIENCE is '{given}'; expected seconds$"):
        supervise("done0")
    assert not Path("tries").exists()


def test_a_trainer_has_eight_minutes_to_stop() -> None:
    assert stop_patience({}) == stop_patience({"HIVE_STOP_PATIENCE": ""}) == 480
    assert stop_patience({"HIVE_STOP_PATIENCE": "0"}) == 0


def test_a_terminal_that_has_gone_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.print", fail)
    assert supervise("1 done0") == (0, 2)


def test_no_pause_behind_the_last_try() -> None:
    begun = time.monotonic()
    assert Supervisor(["false"], Path(), restarts=0, failures=3, pause=60).run() == 1
    assert time.monotonic() - begun < 30


def test_nohup_keeps_it_going() -> None:
    main = "import sys; from hive_ds.cli import main; sys.exit(main())"
    command = ["nohup", sys.executable, "-c", main, "supervise", "--folder", "."]
    trainer = "echo > started; while [ ! -e go ]; do sleep 0.02; done; touch DONE"
    with subprocess.Popen([*command, "--", "sh", "-c", trainer], stdout=subprocess.PIPE) as process:
        wait_for("started")
        process.send_signal(signal.SIGHUP)
        Path("go").touch()
        process.communicate(timeout=20)
    assert process.returncode == 0


def test_what_a_killed_supervisor_left_is_ended() -> None:
    """It would hold the GPUs and the port of the next try."""
    left = subprocess.Popen(["sleep", "1000"], env={"HIVE_ATTEMPT": "earlier.0", "PATH": os.environ["PATH"]})
    Path("attempt").write_text("earlier.0")
    assert supervise("done0") == (0, 1)
    assert left.wait(10) == -signal.SIGKILL


def test_the_attempt_that_a_supervisor_runs_in_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = subprocess.Popen(["sleep", "1000"], env={"HIVE_ATTEMPT": "outer.0", "PATH": os.environ["PATH"]})
    monkeypatch.setenv("HIVE_ATTEMPT", "outer.0")
    Path("attempt").write_text("outer.0")
    assert supervise("done0") == (0, 1)
    assert outer.poll() is None
    outer.kill()
    outer.wait()


def test_signal_during_the_pause_starts_no_other_try() -> None:
    main = "import sys; from hive_ds.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "supervise", "--folder", ".", "--pause", "60"]
    trainer = ["sh", "-c", "echo >> tries; exit 1"]
    with subprocess.Popen([*command, "--", *trainer], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = iter(process.stdout.readline, "")
        assert any("the try ended with exit code 1" in line for line in said)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 85
    assert "stopped; run the same command to go on" in output
    assert Path("tries").read_text() == "\n"


def wait_for(name: str) -> None:
    deadline = time.monotonic() + 20
    while not Path(name).exists() or (name == "started" and not Path(name).read_text()):
        assert time.monotonic() < deadline, name
        time.sleep(0.01)


@pytest.mark.parametrize(
    "command",
    [
        "deepspeed --module hive_ds.train --recipe r --stage 2 --run runs/a --set x=1",
        "torchrun -m hive_ds.train --run-folder=runs/a --stage=modality_adaptation",
        "hive-ds hosts run hosts -- --stage 2 --run-folder runs/a",
        "deepspeed --module hive_ds.train --run runs/b --stage 1 --run runs/a --stage 2",  # the last counts there too
    ],
)
def test_the_folder_is_the_commands(command: str) -> None:
    assert stage_folder(command.split()) == Path("runs/a/stage2")


@pytest.mark.parametrize("command", ["train.sh", "train.sh --run a", "train.sh --stage 1"])
def test_a_command_without_a_stage_is_refused(command: str) -> None:
    message = rf"{command}: expected a training command with --run \(or --run-folder\)"
    with pytest.raises(HiveError, match=message):
        stage_folder(command.split())
