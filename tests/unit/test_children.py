"""What is left of programs and pools whose command is told to end: nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hive_ds import children
from hive_ds.children import Programs, process_pool, processes_with

FORK = multiprocessing.get_context("fork")

COMMAND = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from hive_ds import children
from hive_ds.children import Programs, process_pool
from hive_ds.errors import run_command

children._GRACE = 1.0  # seconds that are waited for one that ignores SIGTERM

def nap(name):
    Path(name).touch()
    time.sleep(1000)

PROGRAM = "trap '' TERM; setsid sleep 1000 & touch $0; while :; do sleep 1; done"

def programs():
    with ThreadPoolExecutor(2) as pool, Programs() as programs:
        started = [pool.submit(programs.run, ["sh", "-c", PROGRAM, name], {**os.environ}) for name in "012"]
        started[0].result()

def pool():
    with process_pool(2, sys.argv[2], time.sleep, 0) as submit:
        [submit(nap, name) for name in "012"][0].result()

if __name__ == "__main__":
    sys.exit(run_command({"programs": programs, "pool": pool}[sys.argv[1]]))
"""


SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
CASES = [(kind, name) for kind in ("programs", "pool fork", "pool spawn") for name in (*SIGNALS, "SIGKILL")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_nothing_is_left(kind: str, name: str, tmp_path: Path) -> None:
    """Of programs one ignores SIGTERM and one has left its group, of which SIGKILL says nothing; Ctrl-C goes to all."""
    (tmp_path / "command.py").write_text(f"import sys; sys.path[:] = {sys.path}{COMMAND}")
    number = getattr(signal, name)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [sys.executable, "command.py", *kind.split()],
        cwd=tmp_path,
        env={**environ, "OF_THIS_TEST": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(list, map(_unignore, (signal.SIGINT, signal.SIGHUP))),
    ) as process:
        begun = [tmp_path / "0", tmp_path / "1"]
        wait_until(lambda: all(path.exists() for path in begun))
        (os.killpg if kind == "programs" or number == signal.SIGINT else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=60)
    told = number == signal.SIGINT or (kind == "programs" and number != signal.SIGKILL)
    assert process.returncode == (128 + number if told else -number)
    assert not told or errors == "\nstopped\n"
    assert not (tmp_path / "2").exists()
    wait_until(lambda: processes_with("OF_THIS_TEST", str(tmp_path)) == [])


def test_a_launcher_that_is_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the process that guards its command; that is none of those which another command has started."""
    monkeypatch.setenv("OF_THIS_TEST", str(tmp_path))
    monkeypatch.setenv("HIVE_COMMAND", str(tmp_path))
    before = signal.signal(signal.SIGINT, _unignore)  # any function
    with Programs() as programs:
        assert processes_with("HIVE_COMMAND", str(tmp_path)) == []
        for program, code in (("setsid sleep 1000 & kill -9 $$", -9), ("exit 3", 3)):
            assert programs.run(["sh", "-c", program], os.environ) == code
    assert processes_with("OF_THIS_TEST", str(tmp_path)) == []
    assert signal.signal(signal.SIGINT, before) == _unignore


def test_a_pool_that_is_broken_off_ends_its_own_processes_alone() -> None:
    others = [
        FORK.Process(target=time.sleep, args=(1000,), daemon=True),
        FORK.Process(target=children._begin, args=(1, print, ())),
    ]
    for other in others:
        other.start()
    with pytest.raises(ValueError, match="broken off"), process_pool(1, "fork", time.sleep, 0) as submit:
        submit(int, "broken off").result()
    others[1].join(20)
    others[0].join(0.5)  # it would have ended by then
    assert [other.exitcode for other in others] == [None, 1]  # the second was started by one that has ended
    others[0].kill()
    others[0].join()


def test_nothing_starts_once_the_command_ends(tmp_path: Path) -> None:
    """What other threads would run next; they are told that it was ended."""
    programs = Programs()
    with pytest.raises(KeyboardInterrupt), programs:
        raise KeyboardInterrupt
    assert programs.run(["touch", str(tmp_path / "file")], os.environ) == -signal.SIGTERM
    assert not (tmp_path / "file").exists()


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Programs():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])


def _unignore(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
