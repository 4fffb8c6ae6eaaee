"""Checkpoint folders on disk: whole or not there, checked by hashes, old ones removed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hive_ds.errors import HiveError
from hive_ds.files import flush, write_whole
from hive_ds.training.distributed import World, all_values

MANIFEST = "manifest.json"


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints of a stage's folder, newest first; what has any other name (step-000100.bak) is none."""
    named = (path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch("step-[0-9]+", path.name))
    return sorted(named, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done, from the folder's name."""
    return int(checkpoint.name.split("-")[1])


def aside_of(final: Path) -> Path:
    """A hidden name beside ``final`` that nobody else uses: of what is not whole yet, or not whole any more."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.partial")


def remove_left_overs(folder: Path) -> None:
    """Remove what killed or replaced attempts left below the hidden names of `aside_of`."""
    for left_over in folder.glob(".step-*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)


def publish(aside: Path, final: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest and give the folder its name; ``files`` are `describe_file` of each by name."""
    write_whole(aside / MANIFEST, json.dumps(files, indent=1))
    flush(aside)
    if final.exists():
        remove(final)
    aside.rename(final)
    flush(final.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is never seen half there."""
    aside = aside_of(checkpoint)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_old(folder: Path, saved: int, keep: int, keep_every: int) -> None:
    """Remove checkpoints older than the newest ``keep``, but those at multiples of ``keep_every`` steps.

    Two kinds do not count among the ``keep``: those of steps past ``saved``, the one just written (a resume has passed
    them over, and the run comes to these steps again), and those that are not whole by names and sizes.
    """
    found = step_folders(folder)
    counted = (one for one in found if step_of(one) <= saved and not faults_of(one, hashes=False))
    kept = list(islice(counted, keep))
    if len(kept) < keep:
        return
    for old in found:
        if step_of(old) < step_of(kept[-1]) and (not keep_every or step_of(old) % keep_every):
            remove(old)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is on disk then."""
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def faults_of(folder: Path, rank: int = 0, ranks: int = 1, *, hashes: bool = True) -> list[str]:
    """Why a checkpoint cannot be used, one line a file; of several ranks each checks a share of the files.

    Without ``hashes`` only names and sizes are compared, which takes no time.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not manifest:
            return [f"{MANIFEST} names no files"]
        named = sorted(manifest.items())[rank::ranks]
        return [fault for name, entry in named if (fault := _file_fault(folder, name, entry, hashes))]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"no readable {MANIFEST} ({error})"]


def fault_of(folder: Path, world: World) -> str | None:
    """The first of `faults_of`, the same on every rank; every rank calls it."""
    return next((fault for own in all_values(faults_of(folder, world.rank, world.size)) for fault in own), None)


def _file_fault(folder: Path, name: str, expected: Mapping[str, Any], hashes: bool) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
    if hashes and _sha256(path) != expected["sha256"]:
        return f"{name} has been changed (another SHA-256)"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """OSError where the disk of ``folder`` has no room for ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / 1e9:.2f} GB left, and a checkpoint takes {needed / 1e9:.2f} GB")


def on_all_ranks(work: Callable[[], Any]) -> tuple[list[Any], str | None]:
    """Do ``work`` on every rank: what each returned, and why the first that could not do it failed.

    A full disk is an OSError only to Python: safetensors and torch.save have errors of their own. A HiveError of one
    rank is raised on all.
    """
    value, failed, refused = None, None, None
    try:
        value = work()
    except (OSError, RuntimeError, SafetensorError) as error:
        failed = str(error)
    except HiveError as error:
        refused = str(error)
    outcomes = all_values((value, failed, refused))
    for _, _, reason in outcomes:
        if reason is not None:
            raise HiveError(reason)
    return [one for one, _, _ in outcomes], next((reason for _, reason, _ in outcomes if reason is not None), None)
