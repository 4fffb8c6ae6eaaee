"""Other tiles than the table's: `python -m benchmarks.tuning [KIND ...]` times each and checks what it computes.

Takes a GPU and, as the benchmark does, a clone (`make gpu-suite` says how to import from one). A tile that wins goes
into `hive_kernels/tiles.py` by hand, with the result file. Source: none; the candidates are what fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout, arguments, hierarchical_attention, tiles
from hive_ds.kernels.testing import Inputs, Results, evaluate, random_inputs

from . import records

PATCHES = 576
NEVER = (0, 64, 8, 1)
"""Of a kernel for short text: the kernels for long text do its work."""


@dataclass(frozen=True)
class Load:
    """Texts of one LLM, each behind an image."""

    lengths: list[int]
    heads: int = 18
    groups: int = 6
    head_dim: int = 64

    @property
    def rows(self) -> int:
        """Query rows of the longest text."""
        return max(self.lengths) * (self.heads // self.groups)


LOADS = {
    "alt-texts": Load([12, 16, 20, 40] * 32),
    "short captions": Load([64] * 64),
    "captions": Load([72, 96, 104, 116, 116, 124, 140, 200] * 16),
    "long": Load([2048] * 8),
    "long, an 8B LLM": Load([2048] * 8, heads=32, groups=8, head_dim=128),
}
"""MobileLLM-600M's heads, where nothing else is said."""
CANDIDATES = {
    ("forward short", 64): [(64, 128, 4, 2), (128, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (256, 64, 8, 2), NEVER],
    ("forward", 64): [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    ("backward short", 64): [(128, 32, 8, 1), (256, 32, 8, 1), NEVER],
    ("keys", 64): [(64, 64, 8, 2), (64, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2)],
    ("queries", 64): [(64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3)],
    ("forward", 128): [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 4, 3)],
    ("keys", 128): [(32, 64, 8, 2), (64, 64, 4, 2)],
    ("queries", 128): [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2)],
}
"""Rows, keys, warps, stages, by kernel and head dim."""
KINDS = list(dict.fromkeys(kind for kind, _ in CANDIDATES))
CALLS = 8
WORST = 2e-2
"""Largest difference from the table's tile, as a share of the largest number: bf16 sums in another order."""


def main() -> None:
    """Time every candidate of the kernels named, or of all, on the texts that they serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; all if none is named")
    kinds = parser.parse_args().kinds or KINDS
    for kind in kinds:
        if kind not in KINDS:
            parser.error(f"kernel {kind!r}: expected some of {', '.join(KINDS)}")
    device = torch.device("cuda", 0)
    rows: list[dict[str, Any]] = []
    for name, load in LOADS.items():
        inputs = inputs_of(load, device)
        base, before = computed(inputs), timed(inputs)
        for (kind, head_dim), candidates in CANDIDATES.items():
            if kind not in kinds or head_dim != load.head_dim or not serves(kind, load):
                continue
            for candidate in candidates:
                row = {"texts": name, "kind": kind, "head_dim": head_dim, "tile": list(candidate), "table_ms": before}
                try:
                    with instead(kind, head_dim, tiles.Tile(*candidate), device) as own:
                        row |= {"table": list(own), "ms": timed(inputs)}
                        row["worst"] = worst_difference(computed(inputs), base)
                except Exception as error:  # more shared memory or registers than there are
                    row["failed"] = f"{type(error).__name__}: {error}"[:200]
                print(row, flush=True)
                rows.append(row)
    print(f"result file: {records.write(records.describe('tiles') | {'rows': rows})}")


@contextmanager
def instead(kind: str, head_dim: int, tile: tiles.Tile, device: torch.device) -> Iterator[tiles.Tile]:
    """``tile`` instead of the table's, which is given back."""
    own_rows = tiles.TABLE[tiles.architecture_of(device)][kind]
    own, short = own_rows[head_dim], arguments.SHORT_ROWS
    own_rows[head_dim] = tile
    if kind == "forward short" and not tile.rows:
        arguments.SHORT_ROWS = 0
    try:
        yield own
    finally:
        own_rows[head_dim], arguments.SHORT_ROWS = own, short


def serves(kind: str, load: Load) -> bool:
    """Whether a kernel runs for these texts; those for long text do where no other tile is tried for short ones."""
    return (load.rows <= tiles.SHORT_ROWS) == kind.endswith("short")


def inputs_of(load: Load, device: torch.device) -> Inputs:
    """One image before each text, norms after the rotation, as the paper has them."""
    count = len(load.lengths)
    layout = AttentionLayout.build(load.lengths, [[PATCHES]] * count, [[0]] * count, device=device)
    return random_inputs(
        layout, heads=load.heads, groups=load.groups, head_dim=load.head_dim, qk_norm="post_rope", rotate=True
    )


def computed(inputs: Inputs) -> Results:
    """Output and gradients in bf16."""
    return evaluate(inputs, hierarchical_attention, dtype=torch.bfloat16, backend="triton")


def worst_difference(found: Results, base: Results) -> float:
    """Largest over all tensors.

    Raises:
        ValueError: it is more than rounding.
    """
    worst = max(float((found[name] - base[name]).abs().max() / base[name].abs().max()) for name in base)
    if not worst <= WORST:
        raise ValueError(f"differs by {worst:.3g} of the largest number; expected at most {WORST}")
    return worst


def timed(inputs: Inputs) -> list[float]:
    """Milliseconds of forward, and of forward and backward: the least of three rounds of calls, the GPU kept busy."""
    half = {name: x.bfloat16().requires_grad_() for name, x in inputs.tensors.items()}
    given: dict[str, Any] = half | {name: x.float() for name, x in inputs.tables.items()}
    given |= {"layout": inputs.layout, "qk_norm": inputs.qk_norm, "backend": "triton"}
    cotangent = torch.randn_like(half["q"])

    def forward() -> Tensor:
        out = hierarchical_attention(**given)
        assert isinstance(out, Tensor)
        return out

    def both() -> None:
        torch.autograd.grad(forward(), list(half.values()), cotangent)

    with torch.no_grad():
        first = min(_milliseconds(forward) for _ in range(3))
    return [first, min(_milliseconds(both) for _ in range(3))]


def _milliseconds(call: Callable[[], object]) -> float:
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(40_000_000)  # some 20 ms, in which the host issues the calls
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS


if __name__ == "__main__":
    main()
