"""Writing checkpoints while training goes on.

Training stands still only while every rank copies its pieces to CPU memory. A thread of each rank then writes and
hashes its files. When the ranks find, in the sum that they make after every step anyway, that all are through, they
exchange sizes and hashes, and a thread of rank 0 gives the checkpoint its name, moves ``latest`` and removes old ones.
The threads never communicate: collectives belong to the main thread, in one order on all ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

from hive_ds.config import TrainingConfig
from hive_ds.files import write_whole
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint_files import (
    aside_of,
    check_space,
    describe_file,
    on_all_ranks,
    publish,
    remove_left_overs,
    remove_old,
)
from hive_ds.training.distributed import World
from hive_ds.training.piece_files import PieceCopy, file_name
from hive_ds.training.random_state import random_file_name, random_state

if TYPE_CHECKING:
    from hive_ds.training.checkpoint import RunIdentity
    from hive_ds.training.engine import Engine


@dataclass(frozen=True)
class SaveReport:
    """How a save ended, the same on every rank but for the seconds."""

    step: int
    blocked_seconds: float
    """Training stood still: for the copy, and where it waited for the writing."""
    seconds: float
    """From the start of the save to its end."""
    failed: str | None
    """Why there is no checkpoint (a full disk, say)."""


@dataclass
class _Save:
    """A save under way."""

    step: int
    start: float
    blocked: float = 0.0
    aside: Path = Path()
    state: dict[str, Any] | None = None
    failed: str | None = None
    work: Future[Any] | None = None
    """Of this rank's thread, while there is any."""
    publishing: bool = False


class CheckpointWriter:
    """Writes checkpoints of one run into the folder of a stage, one at a time.

    Args:
        folder: of the stage.
        engine: weights and optimizer state.
        identity: checked on resume.
        origin: recipe and versions of the run, compared on resume.
        world: this process among all.
        attempt: of this run.
        training: what is kept.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        identity: RunIdentity,
        origin: dict[str, Any],
        world: World,
        attempt: Attempt,
        training: TrainingConfig,
    ) -> None:
        self.folder, self.engine, self.identity, self.origin = folder, engine, identity, origin
        self._world, self._attempt, self._training = world, attempt, training
        self._save: _Save | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._save is not None and self._save.work is not None and not self._save.work.done()

    def begin(self, step: int, loader_state: dict[str, Any]) -> None:
        """Copy what ``folder/checkpoints/step-XXXXXX`` is to hold, and start to write it; every rank calls it.

        The save before must have ended (`wait`).

        Args:
            step: optimizer steps done.
            loader_state: position in the data, the same on every rank.

        Raises:
            HiveError: another attempt has taken over.
        """
        save = _Save(step, time.perf_counter())
        save.state = {
            "step": step,
            "time": time.time(),
            "skipped_steps": self.engine.skipped_steps,
            "ranks": self._world.size,
            "zero_stage": self.engine.zero_stage,
            "loader": loader_state,
            "identity": asdict(self.identity),
            "origin": self.origin,
            "frozen": self.engine.frozen_sums,
        }
        asides, save.failed = on_all_ranks(lambda: self._prepare(step))
        if save.failed is None:
            save.aside = Path(asides[0])
            _, save.failed = on_all_ranks(lambda: self._start_writing(save))
        save.blocked = time.perf_counter() - save.start
        self._save = save

    def advance(self, writing: bool) -> SaveReport | None:
        """Take a save as far as it can go without waiting; every rank calls it after a step.

        Args:
            writing: some rank's `writing` was true before this call; the same on every rank.

        Returns:
            How it ended, once it has.

        Raises:
            HiveError: another attempt has taken over.
        """
        save = self._save
        if save is None or (writing and save.failed is None):
            return None
        start = time.perf_counter()
        ended = save.failed is not None or self._next_phase(save)
        save.blocked += time.perf_counter() - start
        if not ended:
            return None
        self._save = None
        return SaveReport(save.step, save.blocked, time.perf_counter() - save.start, save.failed)

    def wait(self) -> SaveReport | None:
        """Wait until the save under way, if there is one, has ended; otherwise as `advance`."""
        report = None
        while self._save is not None:
            report = self.advance(writing=False)
        return report

    def _next_phase(self, save: _Save) -> bool:
        """Wait for this rank's thread, hear of the others', and go on; whether the save has ended."""
        results, save.failed = on_all_ranks(lambda: self._result(save))
        if save.failed is None and not save.publishing:
            save.publishing = True
            if self._world.is_main:
                save.work = _in_thread(lambda: self._publish(save, results))
            return False
        if save.failed is not None and self._world.is_main:
            remove_left_overs(save.aside.parent)
        return True

    def _result(self, save: _Save) -> Any:
        """What this rank's thread has found out, if it had anything to do."""
        work, save.work = save.work, None
        if not save.publishing:
            self._attempt.check()  # an attempt that took over has removed the files: say that, not that they are gone
        return work and work.result()

    def _prepare(self, step: int) -> str:
        """Make the folder to write to, on rank 0."""
        if not self._world.is_main:
            return ""
        self._attempt.check()
        aside = aside_of(self._final(step))
        aside.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(aside.parent)
        check_space(aside.parent, 12 * self.engine.trained_elements)
        aside.mkdir()
        return str(aside)

    def _start_writing(self, save: _Save) -> None:
        # Under ZeRO 0 every rank holds everything: one copy is enough.
        shares = self.engine.zero_stage > 0 or self._world.is_main
        pieces, random = PieceCopy.of(self.engine.pieces() if shares else []), random_state()
        save.work = _in_thread(lambda: self._write_own(save.aside, pieces, random))

    def _write_own(self, aside: Path, pieces: PieceCopy, random: dict[str, Any]) -> dict[str, Any]:
        pieces_file, random_file = file_name(self._world.rank), random_file_name(self._world.rank)
        pieces.write(aside / pieces_file)
        torch.save({"random": random}, aside / random_file)
        return {name: describe_file(aside / name) for name in (pieces_file, random_file)}

    def _publish(self, save: _Save, described: list[dict[str, Any]]) -> None:
        """Make it the newest checkpoint, on rank 0."""
        final = self._final(save.step)
        (save.aside / "state.json").write_text(json.dumps(save.state))
        files = {name: entry for own in described for name, entry in own.items()}
        files["state.json"] = describe_file(save.aside / "state.json")
        self._attempt.check()
        publish(save.aside, final, files)
        write_whole(self.folder / "latest", final.name)
        remove_old(self.folder, save.step, self._training.keep_checkpoints, self._training.keep_every)

    def _final(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Do ``work`` in a thread that does not keep the process from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whatever it is, the main thread hears of it
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future
