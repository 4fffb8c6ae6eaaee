"""Shared memory that no other run touches, and that the next run clears away when this one is killed.

streaming numbers the blocks of a data set in /dev/shm (``000007_locals``, ...) and its lock files with the first free
number it finds. Two runs that start at once find the same one, and blocks of a killed run stay and stop others. Here
the number is drawn at random from a range that streaming's own search never reaches, and a record beside the blocks
says whose they are. Every process of the run holds a lock (flock) on the record, forked workers included; the kernel
lets go of it when they die, however they die. So a record that can be locked alone has no owner left, in whatever
container its owners were, and its blocks may go.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import streaming.base.dataset as streaming_dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS
from streaming.base.distributed import all_gather_object
from streaming.base.shared import SharedMemory
from streaming.base.world import World

from hive_ds.errors import HiveError

BLOCKS = Path("/dev/shm")
"""Where Linux keeps POSIX shared memory; the records lie beside the blocks, so both go with the machine's memory."""
PREFIXES = (10**9, 10**10)
"""streaming counts from 0, so it never gets here."""


@contextmanager
def own_prefix() -> Iterator[None]:
    """Let StreamingDatasets that are constructed within take their prefix from here and not from streaming's search.

    Construction then raises HiveError, on every rank, where a live run of this user downloads to the same folder.
    """
    original = streaming_dataset.get_shm_prefix
    streaming_dataset.get_shm_prefix = _claim_prefix  # type: ignore[assignment]  # nobody passes its `retry`
    try:
        yield
    finally:
        streaming_dataset.get_shm_prefix = original


def _claim_prefix(folders: list[str], remotes: list[str | None], world: World) -> tuple[int, SharedMemory]:
    """Stand in for streaming's function: the prefix, the same on all ranks of a machine, and the block ``locals``."""
    claimed: tuple[int, str] = (0, "")
    locals_block = None
    if world.is_local_leader:
        caches = [folder for folder, remote in zip(folders, remotes, strict=True) if remote is not None]
        try:
            claimed = (_claim(caches), "")
            locals_block = SharedMemory(f"{claimed[0]}_{LOCALS}", True, 4)
        except (HiveError, OSError) as error:
            claimed = (0, str(error))
    # Gathered even after an error, or the other ranks would wait for ever.
    everyone = all_gather_object(claimed)
    errors = [error for _, error in everyone if error]
    if errors:
        raise HiveError(errors[0])
    prefix = everyone[world.node * world.ranks_per_node][0]
    if locals_block is None:
        _hold(_record(prefix))
        locals_block = SharedMemory(f"{prefix}_{LOCALS}", False)
    return prefix, locals_block


def _claim(caches: Sequence[str]) -> int:
    """Clear away what dead runs left, and record a new prefix as this process's."""
    with _turn():
        for record in BLOCKS.glob(f"hive_ds-{os.getuid()}-*.json"):
            if not _remove_if_dead(record):
                with suppress(FileNotFoundError, ValueError):  # its last process has ended in between, or was killed
                    _check_caches(json.loads(record.read_bytes()), caches)
        prefix = random.SystemRandom().randrange(*PREFIXES)
        owner = {"process": os.getpid(), "caches": list(caches), "lock_folder": tempfile.gettempdir()}
        with open(_record(prefix), "x") as file:
            json.dump(owner, file)
        _hold(_record(prefix))
        return prefix


@contextmanager
def _turn() -> Iterator[None]:
    """One process of this user at a time: two that start at once would not see each other's caches."""
    with open(BLOCKS / f"hive_ds-{os.getuid()}.lock", "a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def release_caches(process: int, prefix: int) -> None:
    """Let others download to the folders of a data set that ``process`` has dropped; does nothing in its workers.

    Takes no turn: the garbage collector may call it at any moment, also while this process has the turn. Who reads the
    record while it is written finds no folders in it, which is what it will say.
    """
    record = _record(prefix)
    if os.getpid() != process or not record.exists():
        return
    # In place: the lock is on this very file.
    record.write_text(json.dumps(json.loads(record.read_bytes()) | {"caches": []}))


def _record(prefix: int) -> Path:
    return BLOCKS / f"hive_ds-{os.getuid()}-{prefix}.json"


def _hold(record: Path) -> None:
    """Count this process and those it forks as owners of ``record`` until they end."""
    file = os.open(record, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_SH)
    # Registered before streaming's own clean-up, hence run after it.
    atexit.register(_let_go, os.getpid(), file, record)


def _let_go(process: int, file: int, record: Path) -> None:
    if os.getpid() == process:  # not in a forked worker
        os.close(file)
        _remove_if_dead(record)


def _remove_if_dead(record: Path) -> bool:
    """Remove ``record`` with all it names, unless a process still owns it; return whether nobody does."""
    try:
        file = os.open(record, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(record, record.stem.rpartition("-")[2])
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _remove(record: Path, prefix: str) -> None:
    for block in BLOCKS.glob(f"{prefix}_*"):
        block.unlink(missing_ok=True)
    with suppress(ValueError, FileNotFoundError):  # killed while it wrote the record, or cleared away by another
        folder = Path(json.loads(record.read_bytes())["lock_folder"])
        for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
            (folder / f"{prefix}_{name}").unlink(missing_ok=True)
    record.unlink(missing_ok=True)  # last, so that a clean-up that is killed is done again


def _check_caches(owner: dict[str, Any], caches: Sequence[str]) -> None:
    shared = sorted(set(owner["caches"]) & set(caches))
    if shared:
        raise HiveError(
            f"data.cache: {shared[0]} is in use by process {owner['process']}; expected a folder that no running job "
            "downloads to"
        )
