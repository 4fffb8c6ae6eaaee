"""Result files: what was measured, on what, from which code."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"

Record = dict[str, Any]
"""One result file: what `describe` says, and what a run adds."""


def describe(kind: str) -> Record:
    """Machine, versions, commit and command of this run. ``kind`` is "benchmark" or the part's name."""
    return {
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": os.environ.get("HIVE_SUITE_COMMAND", shlex.join(sys.orig_argv)),
        "device": device(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
    } | commit()


def device() -> Record:
    """The GPU and its driver, or the processor."""
    if not torch.cuda.is_available():
        return {"name": "cpu", "processor": platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]),
        "cuda": torch.version.cuda,
    }


def commit() -> Record:
    """The commit and whether tracked files differ from it; of a copy without its git, what HIVE_COMMIT says."""
    named = os.environ.get("HIVE_COMMIT")
    head = "" if named else _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if not head:
        return {"commit": named or "unknown", "dirty": None}
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": head, "dirty": bool(changed)}


def write(record: Record) -> Path:
    """Write to $OUT, or else to results/: ``<date>-<device>-<commit>.json``, all but benchmarks with ``-<kind>``.

    What another run wrote stays: the next file's name ends in ``-2``.
    """
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
    suffix = "" if record["kind"] == "benchmark" else f"-{record['kind']}"
    stem = f"{record['date'][:10]}-{name}-{record['commit'][:10]}{suffix}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    """What a command prints, stripped; empty if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
