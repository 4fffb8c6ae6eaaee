"""Checkpoints to resume a stage from, and the folder of weights that one stage hands to the next.

A checkpoint is a folder ``checkpoints/step-000100``: DeepSpeed's files, one small file per rank (loader position,
random state) and ``manifest.json`` with the size of every file. It is written under another name and renamed when
whole; ``latest``, written last, names the newest.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hive_ds.config import StageConfig, TrainingConfig
from hive_ds.errors import HiveError
from hive_ds.training.attempt import Attempt
from hive_ds.training.distributed import World, barrier, from_main
from hive_ds.training.engine import Engine
from hive_ds.training.groups import StagePlan

KEEP = 2
"""Checkpoints left in a run folder: the newest and, should it turn out damaged, the one before."""

_ENGINE = "engine"


@dataclass(frozen=True)
class RunIdentity:
    """What a resumed run must share with the one that wrote the checkpoint."""

    stage: str
    ranks: int
    zero_stage: int
    precision: str
    seed: int
    global_batch_size: int
    parameters: dict[str, list[int]]
    """Shape of every parameter that trains."""
    optimizer_groups: list[str]

    @classmethod
    def of(
        cls, plan: StagePlan, training: TrainingConfig, config: StageConfig, *, ranks: int, ds_config: dict[str, Any]
    ) -> RunIdentity:
        """The identity of a run."""
        return cls(
            stage=plan.stage.name,
            ranks=ranks,
            zero_stage=ds_config.get("zero_optimization", {}).get("stage", 0),
            precision=training.precision,
            seed=training.seed,
            global_batch_size=config.global_batch_size,
            parameters={name: list(plan.shapes[name]) for group in plan.groups for name in group.parameters},
            optimizer_groups=[group.name for group in plan.groups],
        )


def save_checkpoint(
    folder: Path,
    step: int,
    engine: Engine,
    identity: RunIdentity,
    loader_state: dict[str, Any],
    world: World,
    attempt: Attempt,
) -> None:
    """Write ``folder/checkpoints/step-XXXXXX`` and point ``folder/latest`` at it; every rank calls it.

    Args:
        folder: of the stage.
        step: optimizer steps done.
        engine: weights and optimizer state.
        identity: checked on resume.
        loader_state: this rank's position in the data.
        world: this process among all.
        attempt: HiveError where another has taken over.
    """
    attempt.check()
    final = folder / "checkpoints" / f"step-{step:06d}"
    aside = final.with_name(f".{final.name}.partial")
    if world.is_main:
        for left_over in final.parent.glob(".step-*.partial"):
            shutil.rmtree(left_over)
        aside.mkdir(parents=True)
    barrier()
    engine.save(aside, _ENGINE)
    torch.save({"loader": loader_state, "random": _random_state()}, aside / f"rank-{world.rank:05d}.pt")
    barrier()
    if world.is_main:
        state = {"step": step, "skipped_steps": engine.skipped_steps, "identity": asdict(identity)}
        (aside / "state.json").write_text(json.dumps(state))
        attempt.check()
        _publish(aside, final)
        _write_text(folder / "latest", final.name)
        for old in _step_folders(folder)[KEEP:]:
            shutil.rmtree(old)
    barrier()


def newest_checkpoint(folder: Path, world: World, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a stage, equal on all ranks; ``warn`` hears of each that was passed over."""
    found = None
    if world.is_main:
        for candidate in _step_folders(folder):
            fault = _fault(candidate)
            if fault is None:
                found = candidate
                break
            warn(f"checkpoint {candidate} is not complete and is passed over: {fault}")
    return from_main(found)


def load_checkpoint(path: Path, engine: Engine, identity: RunIdentity, world: World) -> tuple[int, dict[str, Any]]:
    """Restore weights, optimizer and random state; return (steps done, this rank's loader state).

    Raises:
        HiveError: the checkpoint belongs to another model, stage or number of ranks.
    """
    state = json.loads((path / "state.json").read_text())
    for name, value in asdict(identity).items():
        saved = state["identity"].get(name)
        if saved != value:
            raise HiveError(
                f"checkpoint {path}: {_difference(name, saved, value)}; use a new run folder or change it back"
            )
    engine.load(path, _ENGINE)
    engine.skipped_steps = state["skipped_steps"]
    mine = torch.load(path / f"rank-{world.rank:05d}.pt", weights_only=True)
    _restore_random_state(mine["random"])
    return state["step"], mine["loader"]


def save_model(folder: Path, engine: Engine, processor: Any, world: World, attempt: Attempt) -> None:
    """Write the whole model as safetensors and its processor to ``folder``; every rank calls it.

    HiveError where another attempt has taken over.
    """
    state = engine.gather_state()
    if world.is_main:
        aside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        engine.model.save_pretrained(aside, state_dict=state)
        processor.save_pretrained(aside)
        attempt.check()
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    barrier()


def _publish(aside: Path, final: Path) -> None:
    """Write the manifest, flush everything to disk, and give the folder its name."""
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(aside)): path.stat().st_size for path in files}
    _write_text(aside / "manifest.json", json.dumps(sizes, indent=1))
    for path in files:
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _flush(final.parent)


def _fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        sizes = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"no readable manifest.json ({error})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def _step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _difference(name: str, saved: Any, wanted: Any) -> str:
    if name != "parameters" or not isinstance(saved, dict):
        return f"it was written with {name} {saved}, this run has {wanted}"
    differing = sorted(key for key in {*saved, *wanted} if saved.get(key) != wanted.get(key))
    first = differing[0]
    return (
        f"it holds another model: {len(differing)} trained parameters differ, first {first} with shape "
        f"{saved.get(first)} against {wanted.get(first)}"
    )


def _write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    _flush(aside)
    os.replace(aside, path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_state() -> dict[str, Any]:
    """Random state of Python, numpy and torch, in types that ``weights_only`` loading allows."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
