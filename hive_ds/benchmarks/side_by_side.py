"""Ways of training in processes of their own: they compile side by side, and are timed in turn on the one GPU."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hive_ds.benchmarks.arms import LABELS

if TYPE_CHECKING:
    from hive_ds.benchmarks.step import Run

GRACE = 10.0
"""Seconds that the processes have less, to put their results together."""
TIMED = 0.4
"""Share of the time that is kept for timing, whoever still compiles by then."""
LOCK = Path(tempfile.gettempdir()) / "hive-ds-gpu.lock"


@contextmanager
def turn_on_gpu(device: torch.device) -> Iterator[None]:
    """Wait until no other process of this machine is being timed; a killed one lets go by itself. Nothing on CPUs."""
    if device.type != "cuda":
        yield
        return
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def time_side_by_side(run: Run, names: Sequence[str], arguments: Sequence[str]) -> None:
    """A process of `hive_ds.benchmarks.step` for each arm; their results are put together as far as they come.

    Args:
        run: gets their rows.
        names: of the arms.
        arguments: of all processes.
    """
    with tempfile.TemporaryDirectory(prefix="hive-ds-step-") as folder:
        _time_in(Path(folder), run, names, arguments)


def _time_in(folder: Path, run: Run, names: Sequence[str], arguments: Sequence[str]) -> None:
    threads = str(max(1, (os.cpu_count() or 1) // len(names)))
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": "4", **os.environ}
    command = [sys.executable, "-m", "hive_ds.benchmarks.step", *arguments]
    command += ["--seconds", str(max(1.0, run.left() - GRACE)), "--until", str(run.deadline - GRACE)]
    children = {
        name: subprocess.Popen([*command, "--arms", name, "--out", str(folder / f"{name}.json")], env=environment)
        for name in names
    }
    begun = run.left()
    with turn_on_gpu(run.setting.device):  # nobody is timed beside others that compile
        while run.left() > begun * TIMED and not _all_ready(folder, children):
            time.sleep(1)
    while run.left() > 0 and any(child.poll() is None for child in children.values()):
        time.sleep(1)
        _put_together(run, folder, children)
    late = [name for name, child in children.items() if child.poll() is None]
    for child in children.values():
        child.kill()
        child.wait()
    _put_together(run, folder, children)
    for name in late:
        run.skip(f"{LABELS[name]}, what is left of it", "no time left for it")
    for name, child in children.items():
        said = any(row["arm"] == name and row["check"] != "passed" for row in run.result["rows"])
        if name not in late and child.returncode and not said:
            run.add({**_nothing(name), "check": f"its process ended with {child.returncode}"})


def _all_ready(folder: Path, children: dict[str, subprocess.Popen[bytes]]) -> bool:
    """Whether every process waits for its turn, or has ended."""
    return all(child.poll() is not None or _read(folder, name)["ready"] for name, child in children.items())


def _nothing(name: str) -> dict[str, Any]:
    return {"arm": name, "label": LABELS[name], "workload": "all that is left"}


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "skipped": [], "ready": False}


def _put_together(run: Run, folder: Path, children: dict[str, subprocess.Popen[bytes]]) -> None:
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for name in children:
        found = _read(folder, name)
        rows += found["rows"]
        skipped += found["skipped"]
        run.rate = max(run.rate, found.get("matmul_flops_per_second", 0.0))
    for row in rows:  # each process measured a rate of its own: one for all
        if "seconds" in row:
            row["mfu"] = row["flops"] / row["seconds"] / run.rate
    run.result |= {"rows": rows, "skipped": skipped, "matmul_flops_per_second": run.rate}
    run.save()
