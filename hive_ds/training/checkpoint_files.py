"""Checkpoint folders on disk: whole or not there, checked by hashes, old ones removed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hive_ds.files import flush, write_whole
from hive_ds.training.distributed import World, all_values

MANIFEST = "manifest.json"


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints of a stage's folder, newest first."""
    return sorted((folder / "checkpoints").glob("step-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done, from the folder's name."""
    return int(checkpoint.name.split("-")[1])


def publish(aside: Path, final: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest and give the folder its name; ``files`` are `describe_file` of each by name."""
    write_whole(aside / MANIFEST, json.dumps(files, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    flush(final.parent)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is on disk then."""
    flush(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def fault_of(folder: Path, world: World) -> str | None:
    """Why a checkpoint cannot be used, or None; every rank calls it, and each checks a share of the files."""
    fault: str | None = None
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = sorted(manifest)[world.rank :: world.size]
        fault = next(filter(None, (_file_fault(folder, name, manifest[name]) for name in names)), None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        fault = f"no readable {MANIFEST} ({error})"
    return next(filter(None, all_values(fault)), None)


def _file_fault(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
    if describe_file(path)["sha256"] != expected["sha256"]:
        return f"{name} has been changed (another SHA-256)"
    return None


def remove_old(folder: Path, keep: int, keep_every: int) -> None:
    """Remove checkpoints past the newest ``keep``, but those at multiples of ``keep_every`` steps."""
    for old in step_folders(folder)[keep:]:
        if not keep_every or step_of(old) % keep_every:
            shutil.rmtree(old)


def check_space(folder: Path, needed: int) -> None:
    """OSError where the disk of ``folder`` has no room for ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / 1e9:.2f} GB left, and a checkpoint takes {needed / 1e9:.2f} GB")


def on_all_ranks(work: Callable[[], Any]) -> tuple[list[Any], str | None]:
    """Do ``work`` on every rank: what each returned, and why the first that could not do it failed.

    A full disk is an OSError only to Python: safetensors and torch.save have errors of their own.
    """
    try:
        outcome: tuple[Any, str | None] = (work(), None)
    except (OSError, RuntimeError, SafetensorError) as error:
        outcome = (None, str(error))
    outcomes = all_values(outcome)
    return [value for value, _ in outcomes], next((error for _, error in outcomes if error), None)
