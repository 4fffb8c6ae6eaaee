"""Steps that are done once: a marker file for each, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hive_ds.errors import HiveError, told_as
from hive_ds.files import write_whole


@dataclass(frozen=True)
class Step:
    """One step of a pipeline."""

    name: str
    what: str
    """What it does, for the reader of the terminal."""
    run: Callable[[], None]
    clears: tuple[Path, ...] = ()
    """What an attempt that was stopped may have left, removed before the next one."""


def check_made_with(path: Path, wanted: Mapping[str, Any], steps: Sequence[Step]) -> None:
    """Write what a folder is made with to ``path``; where it is there already, compare.

    Raises:
        HiveError: names the first value that differs, or what no attempt has left and ``steps`` would clear.
    """
    wanted = json.loads(json.dumps(wanted))
    if not path.is_file():
        for cleared in (path for step in steps for path in step.clears):
            if cleared.exists():
                raise HiveError(
                    f"{cleared}: is there already, and {path} is not: this command did not make it; choose another "
                    "--out, or move it away"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(wanted, indent=2) + "\n")
        return
    with told_as(str(path), "what the folder was made with; choose another --out, or remove the folder"):
        made_with = dict(json.loads(path.read_text()))
    for name, value in wanted.items():
        if made_with.get(name) != value:
            raise HiveError(
                f"{path.parent} was made with {name} {made_with.get(name)}, not {value}; "
                "choose another --out, or remove the folder"
            )


def run_steps(steps: Sequence[Step], markers: Path) -> None:
    """Run, in order, the steps without a marker file in the folder ``markers``."""
    markers.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=1):
        label = f"[{number}/{len(steps)}] {step.name}"
        marker = _marker(markers, step.name)
        if marker.is_file():
            print(f"{label}: done before", flush=True)
            continue
        print(f"{label}: {step.what}", flush=True)
        for path in step.clears:
            shutil.rmtree(path, ignore_errors=True)
        start = time.perf_counter()
        step.run()
        seconds = time.perf_counter() - start
        marker.write_text(json.dumps({"seconds": seconds}) + "\n")
        print(f"{label}: {seconds:.0f} s", flush=True)


def seconds_of(markers: Path, name: str) -> float:
    """How long a finished step took, in the attempt that finished it."""
    marker = _marker(markers, name)
    with told_as(str(marker), "what the step left; remove the file, and it is done again"):
        return float(json.loads(marker.read_text())["seconds"])


def _marker(markers: Path, name: str) -> Path:
    return markers / f"{name.replace(' ', '_')}.json"
