"""Which rank of how many this process is, as the launcher's environment says."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from hive_ds.errors import HiveError


@dataclass(frozen=True)
class World:
    """Rank of this process, ranks in all, ranks on this machine."""

    rank: int
    size: int
    local_size: int


def find_world(environ: MutableMapping[str, str] = os.environ) -> World:
    """Read RANK, WORLD_SIZE and the ranks per machine; HiveError where they contradict each other.

    torchrun gives the ranks per machine as LOCAL_WORLD_SIZE, the deepspeed launcher as LOCAL_SIZE. streaming knows
    the first alone and takes 1 without it, which breaks its shared memory: so LOCAL_WORLD_SIZE is set in ``environ``
    where there are several ranks. A process of its own sets nothing, for the ranks it may launch would inherit it.
    """
    rank, size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    names = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ]
    if size > 1 and not names:
        raise HiveError(f"WORLD_SIZE={size} without LOCAL_WORLD_SIZE or LOCAL_SIZE: expected the ranks of this machine")
    locals_ = [_number(environ, name, 1) for name in names] or [1]
    if len(set(locals_)) > 1:
        raise HiveError(f"LOCAL_WORLD_SIZE={locals_[0]} but LOCAL_SIZE={locals_[1]}: expected one value")
    local_size = locals_[0]
    if not (0 <= rank < size and 0 < local_size <= size and size % local_size == 0):
        raise HiveError(
            f"RANK={rank}, WORLD_SIZE={size}, ranks on this machine {local_size}: expected 0 <= rank < size and "
            "machines of equal size"
        )
    if size > 1:
        environ["LOCAL_WORLD_SIZE"] = str(local_size)
    return World(rank, size, local_size)


def _number(environ: MutableMapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise HiveError(f"environment variable {name}={value!r}: expected a whole number") from None
