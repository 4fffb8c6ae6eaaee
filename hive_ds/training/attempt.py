"""One attempt at a stage among several: when it must stop, and whether another has taken over.

Launch scripts stop a run by a file or a deadline, start it again, and cannot be sure that the old processes are gone:
a node that the network has lost keeps running. So every attempt signs the stage's folder, and the old one's writes are
refused.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hive_ds.errors import HiveError
from hive_ds.files import must_write, write_whole
from hive_ds.training.distributed import World, from_main

_GO_ON, _STOP, _REPLACED = 0.0, 1.0, 2.0
"""What rank 0 tells the others after a step; theirs is 0, so that the sum is its word."""


@dataclass(frozen=True)
class Agreement:
    """The same on every rank."""

    stop: bool
    """Stop after this step: a file STOP is there, or the time is up."""
    writing: bool
    """Some rank is still writing its part of a checkpoint."""


class Attempt:
    """This attempt at the stage in ``folder``.

    Args:
        folder: of the stage.
        world: this process among all.
        env: HIVE_ATTEMPT names the attempt (job id and restart count, say); HIVE_STOP_AT is the time, in seconds since
            the epoch, at which it should stop.

    Raises:
        HiveError: HIVE_STOP_AT is no number.
    """

    def __init__(self, folder: Path, world: World, env: Mapping[str, str] = os.environ) -> None:
        self._stop_file, self._signature, self._world = folder / "STOP", folder / "attempt", world
        self._name = env.get("HIVE_ATTEMPT") or uuid.uuid4().hex
        self._successor: str | None = None
        given = env.get("HIVE_STOP_AT", "inf")
        self._stop_at = math.nan
        with suppress(ValueError):
            self._stop_at = float(given)
        if math.isnan(self._stop_at):
            raise HiveError(f"HIVE_STOP_AT is {given!r}; expected seconds since the epoch")

    def make_folder(self) -> None:
        """Make the folder, or find out early that nothing can be written there; on rank 0.

        Raises:
            HiveError: names it.
        """
        if self._world.is_main:
            with must_write(self._signature.parent, "expected a folder for this run"):
                self._signature.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._signature.parent):
                    pass

    def sign(self) -> None:
        """Take the folder over from earlier attempts; on rank 0.

        Raises:
            HiveError: it cannot be written, and names it.
        """
        if self._world.is_main:
            with must_write(self._signature.parent, "expected a folder for this run"):
                write_whole(self._signature, self._name)

    def check(self) -> None:
        """Refuse to write where another attempt has signed since; rank 0 asks before it publishes anything.

        Raises:
            HiveError: names both attempts.
        """
        if not self._world.is_main:
            return
        now = self._signature.read_text() if self._signature.is_file() else "nobody"
        if now != self._name:
            raise HiveError(self._refusal(now))

    def _refusal(self, now: str) -> str:
        return f"{self._signature.parent}: attempt {now} took over from this one, {self._name}; nothing was written"

    def _read_successor(self) -> str | None:
        """Who has taken over, as far as can be read: a file system that fails for a moment ends no training."""
        with suppress(OSError):
            now = self._signature.read_text()
            return now if now != self._name else None
        return None

    def word(self, *, writing: bool) -> list[float]:
        """What this rank says after a step; `agree` takes the sum over all ranks. Rank 0 says it before it logs.

        Args:
            writing: this rank is still writing its part of a checkpoint.
        """
        word, self._successor = _GO_ON, None
        if self._world.is_main:
            self._successor = self._read_successor()
            if self._successor is not None:
                word = _REPLACED
            elif self._stop_file.exists() or time.time() >= self._stop_at:
                word = _STOP
        return [word, float(writing)]

    def agree(self, said: Sequence[float]) -> Agreement:
        """What all ranks know then.

        Args:
            said: `word` added up over all ranks.

        Raises:
            HiveError: on every rank, where another attempt has taken over; names both.
        """
        word, writers = said
        if word == _REPLACED:
            raise HiveError(self._refusal(from_main(self._successor)))
        return Agreement(stop=word == _STOP, writing=writers > 0)
