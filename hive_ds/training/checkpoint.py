"""Checkpoints to resume a stage from, and the folder of weights that one stage hands to the next.

A checkpoint is a folder ``checkpoints/step-000100``: the pieces of each rank (weights, optimizer state), one small file
per rank (random state), ``state.json`` (what run wrote it, where it is in the data) and ``manifest.json`` with size and
SHA-256 of every file. It is written under another name and renamed when whole; ``latest``, written last, names the
newest (`hive_ds.training.checkpoint_writer`). Any number of ranks, under any ZeRO stage, resumes from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hive_ds.config import StageConfig, TrainingConfig
from hive_ds.errors import HiveError
from hive_ds.files import finish_folder, flush, must_write
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint_files import fault_of, step_folders
from hive_ds.training.distributed import World, barrier, from_main
from hive_ds.training.groups import StagePlan
from hive_ds.training.piece_files import PieceReader, piece_files
from hive_ds.training.random_state import random_file_name, restore_random_state

if TYPE_CHECKING:
    from hive_ds.training.engine import Engine

FROZEN_TOLERANCE = 1e-9
"""Relative difference of sums of squares in fp64 that the order of summation makes."""


@dataclass(frozen=True)
class RunIdentity:
    """What a resumed run must share with the one that wrote the checkpoint; ranks and ZeRO stage may differ."""

    stage: str
    precision: str
    seed: int
    global_batch_size: int
    parameters: dict[str, list[int]]
    """Shape of every parameter that trains."""
    optimizer_groups: list[str]
    model: dict[str, Any]
    """How it is joined, where shapes do not tell: another way would compute something else with the same weights."""

    @classmethod
    def of(cls, plan: StagePlan, training: TrainingConfig, config: StageConfig, model: TrainedModel) -> RunIdentity:
        """The identity of a run."""
        joined = ("qk_norm", "rope", "vision_feature_layer")
        return cls(
            stage=plan.stage.name,
            precision=training.precision,
            seed=training.seed,
            global_batch_size=config.global_batch_size,
            parameters={name: list(plan.shapes[name]) for group in plan.groups for name in group.parameters},
            optimizer_groups=[group.name for group in plan.groups],
            model={name: getattr(model.config, name) for name in joined if hasattr(model.config, name)},
        )


def newest_checkpoint(folder: Path, world: World, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a stage, equal on all ranks; ``warn`` hears of each that was passed over.

    Raises:
        HiveError: there are checkpoints, and none is complete. Files that cannot be read now may be again later.
    """
    faults = []
    for candidate in from_main(step_folders(folder)):
        fault = fault_of(candidate, world)
        if fault is None:
            return Path(candidate)
        warn(f"checkpoint {candidate} is not complete and is passed over: {fault}")
        faults.append(f"{candidate.name}: {fault}")
    if faults:
        raise HiveError(
            f"{folder / 'checkpoints'}: no checkpoint is complete ({'; '.join(faults)}); copy one back, or remove "
            "these folders to begin the stage again at step 0"
        )
    return None


def read_state(
    path: Path, engine: Engine, identity: RunIdentity, *, origin: dict[str, Any], warn: Callable[[str], None]
) -> dict[str, Any]:
    """What a checkpoint's ``state.json`` says, if this run may go on from it.

    Args:
        path: of the checkpoint.
        engine: of this run, on any number of ranks.
        identity: of this run.
        origin: of this run; ``warn`` hears where the checkpoint's differs.
        warn: prints on rank 0.

    Raises:
        HiveError: the checkpoint belongs to another model, stage or batch, or frozen weights are not those it was
            trained with.
    """
    state = json.loads((path / "state.json").read_text())
    for name, value in asdict(identity).items():
        saved = state["identity"].get(name)
        if saved != value:
            raise HiveError(
                f"checkpoint {path}: {_difference(name, saved, value)}; use a new run folder or change it back"
            )
    _check_frozen(path, state["frozen"], engine.frozen_sums)
    for name in sorted({*state["origin"], *origin}):
        before, now = state["origin"].get(name), origin.get(name)
        if before != now:
            warn(f"checkpoint {path} was written with {name} = {before}, this run has {now}")
    return state


def load_checkpoint(path: Path, state: dict[str, Any], engine: Engine, world: World) -> None:
    """Restore weights, optimizer and random state of the checkpoint at ``path``, whose `read_state` is given."""
    with PieceReader(piece_files(path)) as reader:
        engine.restore(reader, state["step"] - state["skipped_steps"])
    engine.skipped_steps = state["skipped_steps"]
    if world.rank < state["ranks"]:  # a rank that was not there goes on from its seed
        mine = torch.load(path / random_file_name(world.rank), weights_only=True)
        restore_random_state(mine["random"])


def save_model(folder: Path, engine: Engine, processor: Any, world: World, attempt: Attempt) -> None:
    """Write the whole model as safetensors and its processor to ``folder``; every rank calls it.

    Raises:
        HiveError: another attempt has taken over.
        OutsideError: the disk is full or fails.
    """
    state = engine.gather_state()
    if world.is_main:
        aside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        with must_write(folder, "make room, and the same command goes on from the newest checkpoint"):
            engine.model.save_pretrained(aside, state_dict=state)
            processor.save_pretrained(aside)
            finish_folder(aside)  # the stage is called done after this, and is not trained again
        attempt.check()
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        flush(folder.parent)
    barrier()


def _check_frozen(path: Path, saved: dict[str, float], now: dict[str, float]) -> None:
    for name, value in now.items():
        if name not in saved or abs(value - saved[name]) > FROZEN_TOLERANCE * max(abs(value), abs(saved[name])):
            raise HiveError(
                f"checkpoint {path}: frozen weights {name} are not those it was trained with; the base models, or the "
                "model of the stage before, have changed"
            )


def _difference(name: str, saved: Any, wanted: Any) -> str:
    if name != "parameters" or not isinstance(saved, dict):
        return f"it was written with {name} {saved}, this run has {wanted}"
    differing = sorted(key for key in {*saved, *wanted} if saved.get(key) != wanted.get(key))
    first = differing[0]
    return (
        f"it holds another model: {len(differing)} trained parameters differ, first {first} with shape "
        f"{saved.get(first)} against {wanted.get(first)}"
    )
