"""Versions of what runs: this package, its commit, the libraries, the machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from hive_ds import __version__
from hive_ds.launch.probe import version

LIBRARIES = ("torch", "deepspeed", "transformers", "triton", "mosaicml-streaming")


def installed_versions() -> dict[str, str | None]:
    """Versions by name, ``hive-ds`` and ``commit`` first; None for what is not installed, or runs from no clone."""
    return {"hive-ds": __version__, "commit": _commit(), **{library: version(library) for library in LIBRARIES}}


def made_with() -> dict[str, Any]:
    """What belongs beside a measured figure: when, by which command, on what, with which versions."""
    return {
        "date": date.today().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }


def hardware() -> str:
    """Cores that this process may use, the vector instructions that torch uses on them, and GPUs, in words."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = f"{len(os.sched_getaffinity(0))} CPU cores ({torch.backends.cpu.get_cpu_capability()})"
    return f"{cores}, {', '.join(names) or 'no GPU'}"


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
