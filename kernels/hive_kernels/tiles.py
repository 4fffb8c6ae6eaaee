"""Tile sizes and launch settings: a table by architecture, head dim and kernel. Nothing is tuned at run time.

Lengths choose between short and long text and are no key otherwise: new lengths never compile anything.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton interprets the kernels, on CPU tensors; it looks when they are imported."""


class Tile(NamedTuple):
    """One kernel's launch settings."""

    rows: int
    """Rows (query heads of tokens) of a tile."""
    keys: int
    """Keys of a tile."""
    warps: int
    stages: int
    """Loads in flight: depth of the software pipeline."""


SHORT_ROWS = 256
"""Query rows (tokens x heads of a group) of a sample up to which text is short: few programs read each of its keys."""

KINDS = ("forward short", "forward", "decode", "backward short", "keys", "queries")
"""Kernels: forward with keys finished inside, forward on finished keys, one query token a sample; backward of short
text in one pass, and of long text in two. The rows of "backward short" are the most that it takes."""

_AMPERE = {
    "forward short": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 16, 8, 1)},
    "forward": {32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 4, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    "decode": {32: Tile(16, 64, 4, 3), 64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 2)},
    "backward short": {
        32: Tile(128, 32, 8, 1),
        64: Tile(128, 32, 8, 1),
        128: Tile(0, 16, 8, 1),
        256: Tile(0, 16, 8, 1),
    },
    "keys": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 32, 8, 1)},
    "queries": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
}
_HOPPER = {
    "forward short": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 1)},
    "forward": {32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    "decode": {32: Tile(16, 64, 4, 3), 64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 2)},
    "backward short": {
        32: Tile(256, 64, 8, 1),
        64: Tile(256, 64, 8, 1),
        128: Tile(0, 32, 8, 1),
        256: Tile(0, 16, 8, 1),
    },
    "keys": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    "queries": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
}
# With 4 warps a thread has 512 registers; the one-pass backward spills all the same.
_CDNA3 = {
    kind: {width: tile._replace(warps=4, stages=1) for width, tile in tiles.items()} for kind, tiles in _AMPERE.items()
} | {"backward short": {width: Tile(0, 16, 4, 1) for width in (32, 64, 128, 256)}}
# Small, so that small shapes have several tiles of each sort.
_INTERPRETER = {kind: {width: Tile(16, 16, 1, 1) for width in (32, 64, 128, 256)} for kind in KINDS} | {
    "backward short": {width: Tile(32, 16, 1, 1) for width in (32, 64, 128, 256)}
}
_SINGLE = {
    "forward short": Tile(32, 32, 4, 1),
    "forward": Tile(32, 32, 4, 1),
    "decode": Tile(16, 32, 4, 1),
    "backward short": Tile(0, 16, 4, 1),
    "keys": Tile(16, 32, 4, 1),
    "queries": Tile(32, 16, 4, 1),
}
"""fp32 on every GPU: exact products run on the general units and need more registers."""

TABLE = {"sm_80": _AMPERE, "sm_90": _HOPPER, "gfx942": _CDNA3, "interpreter": _INTERPRETER}


def choose_tile(architecture: str, head_dim: int, kind: str, dtype: torch.dtype) -> Tile:
    """The settings of one kernel, ``head_dim`` at most 256."""
    if dtype == torch.float32 and architecture != "interpreter":
        return _SINGLE[kind]
    width = next(width for width in (32, 64, 128, 256) if head_dim <= width)
    return TABLE[architecture][kind][width]


@cache  # asked for at every launch, where torch takes 10 us to say it
def architecture_of(device: torch.device) -> str:
    """Name of the row of `TABLE` that serves a device; a CPU is the interpreter's."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    # Of the later ones 9 and 10 have 227 KiB of shared memory a block; 12, of workstations, has 99 as 8.6 and 8.9 do.
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"
