"""Run the training command of a stage until the stage is done: what slurm/body.sh is to Slurm, on one machine.

How it goes on is decided by files, not by exit codes alone: RUN/stageN/DONE is success, whatever the command says;
RUN/stageN/STOP asks the trainer to save and stop. Each try is an attempt of its own (HIVE_ATTEMPT), so that whatever is
left of an earlier one, on other hosts too, cannot write any more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hive_ds.children import kill_with, processes_with
from hive_ds.constants import EXIT_STOPPED
from hive_ds.errors import HiveError
from hive_ds.stages import stage_called

WRONG_INPUT = (2, 126, 127)
"""Exit codes of tries that another one would not mend: wrong input; a shell's for no such program."""
ASK = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask the trainer to save and stop; the second SIGTERM or SIGINT ends it at once. SIGHUP comes when the
terminal has gone, unless nohup has switched it off."""
PATIENCE = 480.0
"""Seconds that a trainer has to save and stop, unless HIVE_STOP_PATIENCE says otherwise."""
_POLL = 0.05
_ATTEMPT = "HIVE_ATTEMPT"


class Supervisor:
    """Tries of one training command.

    Args:
        command: program and arguments.
        folder: of the stage, RUN/stageN.
        restarts: how often to start again, for whatever reason.
        failures: give up after so many in a row without a new checkpoint.
        pause: seconds between two tries.

    Raises:
        HiveError: HIVE_STOP_PATIENCE is no number of seconds.
    """

    def __init__(self, command: Sequence[str], folder: Path, *, restarts: int, failures: int, pause: float) -> None:
        self._command, self._folder = list(command), folder
        self._restarts, self._failures, self._pause = restarts, failures, pause
        self._patience = stop_patience(os.environ)
        self._name = uuid.uuid4().hex[:12]
        self._newest_at_failures: list[str] = []
        self._end_at: float | None = None
        """Once a stop is asked for: when to stop waiting for it."""
        self._news: list[str] = []
        """Said by signal handlers, which must not print."""

    def run(self) -> int:
        """Try until the stage is done, was stopped, or cannot be done; returns the exit code.

        0 done, 2 wrong input, 85 stopped on request (run it again to go on), 1 given up.

        Raises:
            HiveError: there is no such program.
        """
        if self._done():
            say(f"{self._folder} is done already")
            return 0
        self._stop_file.unlink(missing_ok=True)  # of an earlier run; what comes from here on is for this one
        self._end_earlier()
        with self._signals():
            for number in range(self._restarts + 1):
                code = self._try(number)
                verdict = self._conclude(code, number)
                if verdict is not None:
                    return verdict
                say(f"the try ended with exit code {code} before the stage was done")
                if number < self._restarts:
                    self._sleep()
                    if self._end_at is not None:
                        return self._stopped()
        say(f"no restart is left (--restarts {self._restarts}); run the same command to go on")
        return 1

    @property
    def _stop_file(self) -> Path:
        return self._folder / "STOP"

    def _done(self) -> bool:
        return (self._folder / "DONE").exists()

    def _try(self, number: int) -> int:
        """One try, and the end of all its processes; returns its exit code, as a shell counts."""
        attempt = f"{self._name}.{number}"
        say(f"{self._folder}, attempt {attempt}")
        try:
            process = subprocess.Popen(self._command, env={**os.environ, _ATTEMPT: attempt}, start_new_session=True)
        except OSError as error:
            raise HiveError(f"{self._command[0]}: cannot be started ({error.strerror})") from error
        try:
            while process.poll() is None:
                self._say_news()
                if self._end_at is not None and time.monotonic() >= self._end_at:
                    say("ending the trainer")
                    os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(_POLL)
        finally:
            _kill(attempt)
        self._say_news()
        code = process.wait()
        return code if code >= 0 else 128 - code

    def _end_earlier(self) -> None:
        """End what a supervisor that was killed has left here: it would hold the GPUs and the port."""
        name = self._folder / "attempt"
        left = name.read_text().strip() if name.is_file() else ""
        if left not in ("", os.environ.get(_ATTEMPT)) and processes_with(_ATTEMPT, left):  # not what runs this
            say(f"ending what is left of attempt {left}")
            _kill(left)

    def _conclude(self, code: int, number: int) -> int | None:
        """The exit code to end with, or None to start again."""
        if self._done():
            say("done")
            return 0
        # A later try that had a checkpoint to go on from had right input before.
        latest = self._folder / "latest"
        if code in WRONG_INPUT and not (code == 2 and number and latest.is_file()):
            say(f"exit code {code}: wrong input, which another try would not mend")
            return 2
        if self._end_at is not None or code == EXIT_STOPPED or self._stop_file.exists():
            return self._stopped()
        self._newest_at_failures.append(latest.read_text() if latest.is_file() else "none")
        last = self._newest_at_failures[-self._failures :]
        if len(last) == self._failures and len(set(last)) == 1:
            say(f"failed {self._failures} times without a new checkpoint: giving up")
            return 1
        return None

    def _stopped(self) -> int:
        self._say_news()
        say("stopped; run the same command to go on")
        return EXIT_STOPPED

    def _sleep(self) -> None:
        end = time.monotonic() + self._pause
        while self._end_at is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL))

    def _say_news(self) -> None:
        while self._news:
            say(self._news.pop(0))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        ask = [number for number in ASK if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP]
        before = {number: signal.signal(number, self._on_signal) for number in ask}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._end_at is None:
            self._news.append(f"{signal.Signals(number).name}: asking the trainer to save and stop")
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stop_file.touch()
            self._end_at = time.monotonic() + self._patience
        elif number not in (signal.SIGUSR1, signal.SIGHUP):
            self._end_at = time.monotonic()


def stop_patience(env: Mapping[str, str]) -> float:
    """Seconds that a trainer has to save and stop.

    Raises:
        HiveError: HIVE_STOP_PATIENCE is something else.
    """
    given = env.get("HIVE_STOP_PATIENCE") or str(PATIENCE)
    with suppress(ValueError):
        if (seconds := float(given)) >= 0:
            return seconds
    raise HiveError(f"HIVE_STOP_PATIENCE is {given!r}; expected seconds")


def stage_folder(command: Sequence[str]) -> Path:
    """RUN/stageN, from --run (or --run-folder) and --stage of a training command.

    Raises:
        HiveError: one of them is not there, or there is no such stage.
    """
    run, stage = _value(command, "--run", "--run-folder"), _value(command, "--stage")
    if run is None or stage is None:
        raise HiveError(
            f"{' '.join(command)}: expected a training command with --run (or --run-folder) and --stage, or --folder "
            "before it to say where the stage is"
        )
    return Path(run) / f"stage{stage_called(stage).number}"


def _value(command: Sequence[str], *names: str) -> str | None:
    found = None
    for word, following in zip(command, [*command[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            found = value if equals else following
    return found


def _kill(attempt: str) -> None:
    """Kill every process on this machine that was started, however indirectly, for ``attempt``."""
    if left := kill_with(_ATTEMPT, attempt):
        say(f"processes {left} do not end")


def say(text: str) -> None:
    """Print a line with the time."""
    with suppress(OSError):  # the terminal may have gone
        print(f"{time.strftime('%F %T')} {text}", flush=True)
