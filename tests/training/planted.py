"""The trainer with a fault planted in one rank: ``torchrun ... -m planted ARGUMENTS`` or ``main(ARGUMENTS)``.

HIVE_PLANT is ``FAULT RANK STEP``: what goes wrong, and where. It does in the first forward pass of that step, in
`MODULE`. The rank also waits for its data in every step; all ranks are taken to compute alike, as those that share busy
cores do only by chance.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from hive_ds import train
from hive_ds.training import pace, step_sums, watchdog
from hive_ds.training.checkpoint_writer import CheckpointWriter, SaveReport
from hive_ds.training.faults import leave
from hive_ds.training.place import here

MODULE = "language_model.model.layers.2.mlp"


def sleep_for_ever() -> None:
    time.sleep(10_000)


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raise_error() -> None:
    raise RuntimeError("planted\nerror")


def kill_a_worker() -> None:
    """As the kernel's out-of-memory killer does."""
    workers = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "planted|forkserver"], capture_output=True, text=True
    )
    os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
    time.sleep(60)  # the signal that a child has died ends it


FAULTS = {fault.__name__: fault for fault in (sleep_for_ever, stop_this_process, raise_error, kill_a_worker)}


def plant(fault: str, step: int) -> None:
    """Let ``fault`` happen in step ``step``, in `MODULE`."""
    start = train._start_job

    def with_fault(run: Any, engine: Any, *others: Any) -> Any:
        module = engine.model.get_submodule(MODULE)
        forward = module.forward

        def faulty(hidden: Any) -> Any:
            if here.step == step and here.phase == "forward":
                (run.folder.run / "planted").write_text(str(time.time()))
                FAULTS[fault]()
            return forward(hidden)

        module.forward = faulty
        return start(run, engine, *others)

    train._start_job = with_fault


def end_saves_a_step_later() -> None:
    """Let the step behind a checkpoint wait for it: a fault then comes after it, however slow the disk is."""
    advance = CheckpointWriter.advance

    def to_the_end(self: CheckpointWriter, writing: bool) -> SaveReport | None:
        report = None
        while self._save is not None:
            report = advance(self, writing=False)
        return report

    CheckpointWriter.advance = to_the_end  # type: ignore[method-assign]


def slow_data(seconds: float) -> None:
    """Let this rank wait for every micro-batch."""

    def slow_next(batches: Any) -> Any:
        time.sleep(seconds)
        return next(batches)

    step_sums.next = slow_next  # type: ignore[attr-defined]


def main(arguments: list[str]) -> None:
    watchdog.ANSWER_SECONDS = 3.0
    pace.SLOW_SECONDS, pace.SLOW_LINES = 0.0, 3
    end_saves_a_step_later()
    pace.matmul_times = lambda device, dtype: [1.0]
    fault, rank, step = os.environ["HIVE_PLANT"].split()
    if os.environ.get("RANK", "0") == rank:
        slow_data(0.5)
        plant(fault, int(step))
    leave(train.main(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
