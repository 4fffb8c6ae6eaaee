"""A run under `hive-ds supervise` whose processes are all killed, again and again, at drawn moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import run_forked
from tiny_run import TinyRun

from hive_ds.children import processes_with

MAIN = Path(__file__).parent / "kill_main.py"
STEPS_A_KILL = 8
"""Steps that the run must have for each kill, so that it does not end before the last."""
PATIENCE = 240
WRITE = 0.03
"""Seconds after a write began within which it is killed; most take no longer."""


@dataclass
class KilledRun:
    """A run of stage 1 with a checkpoint after each step.

    Attributes:
        tiny: models, data and recipe.
        name: of the run.
        ranks: started by torchrun where there are several.
        steps: of the stage.
        hits: what was found after the kills: ``write`` (a checkpoint half written), ``latest`` (named, but ``latest``
            not moved yet), ``start`` (before the first step) and ``step``.
    """

    tiny: TinyRun
    name: str
    ranks: int
    steps: int
    hits: Counter[str] = field(default_factory=Counter)

    @property
    def folder(self) -> Path:
        return self.tiny.root / self.name / "stage1"

    @property
    def record(self) -> Path:
        return self.tiny.root / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        return self.tiny.root / f"{self.name}.log"

    def arguments(self, *options: str) -> list[str]:
        """Of `kill_main`."""
        values = (
            f"stages.connector_pretraining.steps={self.steps}",
            *("training.checkpoint_interval=1", "training.keep_checkpoints=3", "training.validation_interval=0"),
            *("training.tensorboard=false", "model.gradient_checkpointing=false", "data.max_bad_share=1"),
        )
        changed = [part for value in values for part in ("--set", value)]
        return [str(self.record), *self.tiny.arguments(1, self.name, *changed, *options)]

    def train(self, *options: str) -> None:
        """Train without a kill; ``options`` are the trainer's."""
        arguments, env = self.arguments(*options), self.tiny.environment()
        done = run_forked("kill_main:main", arguments, env, self.ranks, PATIENCE + self.steps)
        assert done.returncode == 0, done.stderr[-3000:]

    def train_and_kill(self, seed: int, kills: int) -> None:
        """Train under the supervisor, and kill so often."""
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={self.ranks}", "--standalone"]
        supervise = [sys.executable, "-c", "import sys; from hive_ds.cli import main; sys.exit(main())", "supervise"]
        limits = ["--restarts", str(kills), "--failures", str(kills + 1), "--pause", "0"]
        drawn = random.Random(seed)
        with self.log.open("w") as output:
            process = subprocess.Popen(
                [*supervise, *limits, "--", *launcher, str(MAIN), *self.arguments()],
                stdout=output,
                stderr=output,
                env=self.tiny.environment(),
            )
            try:
                for number in range(kills):
                    self._kill(number, drawn, process)
                assert process.wait(PATIENCE + self.steps) == 0, self.log.read_text()[-3000:]
            finally:
                process.terminate()
                process.terminate()
                process.wait()

    def _kill(self, number: int, drawn: random.Random, supervisor: subprocess.Popen[bytes]) -> None:
        """Kill one try: during a write, at any moment of a step, or while it starts."""
        self._wait(supervisor, lambda: len(self._attempts()) == number + 1, "the next try")
        attempt, steps = self._attempts()[-1], self._steps()
        kind = drawn.choices(["write", "step", "start"], [6, 3, 1])[0]
        if kind == "start":
            time.sleep(drawn.uniform(0, 6))
        else:
            # Two steps on, the checkpoint of the first of them is there: every such try gets the run on.
            self._wait(supervisor, lambda: self._steps() >= steps + 2, "two steps")
            processes = processes_with("HIVE_ATTEMPT", attempt)
            if kind == "write":
                known = set(self._partial())
                self._wait(supervisor, lambda: bool(set(self._partial()) - known), "a write", every=0)
                time.sleep(drawn.uniform(0, WRITE))
            else:
                time.sleep(drawn.uniform(0, 0.2))
            _kill_all(processes)
        while processes := processes_with("HIVE_ATTEMPT", attempt):
            _kill_all(processes)
        self.hits[self._found(steps)] += 1

    def _found(self, steps: int) -> str:
        """What the kill hit, from what it left."""
        latest = self.folder / "latest"
        named = sorted(path.name for path in self.folder.glob("checkpoints/step-*"))
        if self._partial():
            return "write"
        if named and (not latest.exists() or latest.read_text() != named[-1]):
            return "latest"
        return "start" if self._steps() == steps else "step"

    def _partial(self) -> list[str]:
        with suppress(FileNotFoundError):
            return [name for name in os.listdir(self.folder / "checkpoints") if name.endswith(".partial")]
        return []

    def _attempts(self) -> list[str]:
        return [line.split()[-1] for line in self.log.read_text().splitlines() if ", attempt " in line]

    def _steps(self) -> int:
        return sum("step" in line for line in self.lines())

    def lines(self) -> list[dict[str, Any]]:
        """What all tries have written down; a kill may have cut a line short."""
        lines = []
        for text in self.record.read_text().splitlines() if self.record.exists() else []:
            with suppress(ValueError):
                lines.append(json.loads(text))
        return lines

    def _wait(self, supervisor: subprocess.Popen[bytes], condition: Any, what: str, every: float = 0.01) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert supervisor.poll() is None, f"ended before {what}: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no sign of {what}: {self.log.read_text()[-3000:]}"
            time.sleep(every)


def _kill_all(processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
