"""Checkpoints to resume a stage from, and the folder of weights that one stage hands to the next.

A checkpoint is a folder ``checkpoints/step-000100``: the pieces of each rank (weights, optimizer state), one small file
per rank (random state), ``state.json`` (what run wrote it, where it is in the data) and ``manifest.json`` with size and
SHA-256 of every file. It is written under another name and renamed when whole; ``latest``, written last, names the
newest. Any number of ranks, under any ZeRO stage, resumes from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hive_ds.config import StageConfig, TrainingConfig
from hive_ds.errors import HiveError
from hive_ds.files import write_whole
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint_files import (
    check_space,
    describe_file,
    fault_of,
    on_all_ranks,
    publish,
    remove_old,
    step_folders,
)
from hive_ds.training.distributed import World, barrier, from_main
from hive_ds.training.engine import Engine
from hive_ds.training.groups import StagePlan
from hive_ds.training.piece_files import PieceReader, file_name, write_pieces
from hive_ds.training.random_state import random_state, restore_random_state

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

    @classmethod
    def of(cls, plan: StagePlan, training: TrainingConfig, config: StageConfig) -> RunIdentity:
        """The identity of a run."""
        return cls(
            stage=plan.stage.name,
            precision=training.precision,
            seed=training.seed,
            global_batch_size=config.global_batch_size,
            parameters={name: list(plan.shapes[name]) for group in plan.groups for name in group.parameters},
            optimizer_groups=[group.name for group in plan.groups],
        )


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes checkpoints of one run into the folder of a stage.

    Attributes:
        folder: of the stage.
        engine: weights and optimizer state.
        identity: checked on resume.
        origin: recipe and versions of the run, compared on resume.
        world: this process among all.
        attempt: of this run.
        training: what is kept.
    """

    folder: Path
    engine: Engine
    identity: RunIdentity
    origin: dict[str, Any]
    world: World
    attempt: Attempt
    training: TrainingConfig

    def save(self, step: int, loader_state: dict[str, Any]) -> str | None:
        """Write ``folder/checkpoints/step-XXXXXX`` and point ``folder/latest`` at it; every rank calls it.

        Args:
            step: optimizer steps done.
            loader_state: position in the data, the same on every rank.

        Returns:
            Why it could not be written (a full disk, say), the same on every rank; None if it was.

        Raises:
            HiveError: another attempt has taken over.
        """
        final = self.folder / "checkpoints" / f"step-{step:06d}"
        aside = final.with_name(f".{final.name}.partial")
        frozen = self.engine.frozen_sums
        _, failed = on_all_ranks(lambda: self._prepare(aside))
        described: list[dict[str, Any]] = []
        if failed is None:
            described, failed = on_all_ranks(lambda: self._write_own(aside))
        if failed is None:
            state = {
                "step": step,
                "skipped_steps": self.engine.skipped_steps,
                "ranks": self.world.size,
                "loader": loader_state,
                "identity": asdict(self.identity),
                "origin": self.origin,
                "frozen": frozen,
            }
            _, failed = on_all_ranks(lambda: self._publish(aside, final, state, described))
        if failed is not None and self.world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        return failed

    def _prepare(self, aside: Path) -> None:
        if not self.world.is_main:
            return
        self.attempt.check()
        aside.parent.mkdir(parents=True, exist_ok=True)
        for left_over in aside.parent.glob(".step-*.partial"):
            shutil.rmtree(left_over)
        check_space(aside.parent, 12 * self.engine.trained_elements)
        aside.mkdir()

    def _write_own(self, aside: Path) -> dict[str, Any]:
        rank_file = f"rank-{self.world.rank:05d}.pt"
        pieces_file = file_name(self.world.rank)
        # Under ZeRO 0 every rank holds everything: one copy is enough.
        shares = self.engine.zero_stage > 0 or self.world.is_main
        write_pieces(aside / pieces_file, self.engine.pieces() if shares else [])
        torch.save({"random": random_state()}, aside / rank_file)
        return {name: describe_file(aside / name) for name in (pieces_file, rank_file)}

    def _publish(self, aside: Path, final: Path, state: dict[str, Any], described: list[dict[str, Any]]) -> None:
        if not self.world.is_main:
            return
        (aside / "state.json").write_text(json.dumps(state))
        files = {name: entry for own in described for name, entry in own.items()}
        files["state.json"] = describe_file(aside / "state.json")
        self.attempt.check()
        publish(aside, final, files)
        write_whole(self.folder / "latest", final.name)
        remove_old(self.folder, self.training.keep_checkpoints, self.training.keep_every)


def newest_checkpoint(folder: Path, world: World, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a stage, equal on all ranks; ``warn`` hears of each that was passed over."""
    for candidate in from_main(step_folders(folder)):
        fault = fault_of(candidate, world)
        if fault is None:
            return Path(candidate)
        warn(f"checkpoint {candidate} is not complete and is passed over: {fault}")
    return None


def load_checkpoint(
    path: Path,
    engine: Engine,
    identity: RunIdentity,
    world: World,
    *,
    origin: dict[str, Any],
    warn: Callable[[str], None],
) -> tuple[int, dict[str, Any]]:
    """Restore weights, optimizer and random state; return (steps done, loader state).

    Args:
        path: of the checkpoint.
        engine: of this run, on any number of ranks.
        identity: of this run.
        world: this process among all.
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
    with PieceReader([path / file_name(rank) for rank in range(state["ranks"])]) as reader:
        engine.restore(reader, state["step"] - state["skipped_steps"])
    engine.skipped_steps = state["skipped_steps"]
    if world.rank < state["ranks"]:  # a rank that was not there goes on from its seed
        mine = torch.load(path / f"rank-{world.rank:05d}.pt", weights_only=True)
        restore_random_state(mine["random"])
    return state["step"], state["loader"]


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
