"""Other tiles than the table's: `python -m benchmarks.tuning [KIND ...]` times each and checks what it computes.

Takes a GPU and, as the benchmark does, a clone (`make gpu-suite` says how to import from one). A tile that wins goes
into `hive_kernels/tiles.py` by hand, with the result file. Source: none; the candidates are what fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout, hierarchical_attention, tiles
from hive_ds.kernels.testing import Inputs, Results, evaluate, random_inputs

from . import records

HEADS, GROUPS, HEAD_DIM = 18, 6, 64
"""MobileLLM-600M's."""
PATCHES = 576
TEXTS = {
    "alt-texts": [12, 16, 20, 40] * 32,
    "captions": [72, 96, 104, 116, 116, 124, 140, 200] * 16,
    "long": [2048] * 8,
}
CANDIDATES = {
    "forward short": [(64, 128, 4, 2), (128, 64, 4, 2), (64, 64, 4, 3)],
    "forward": [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    "backward short": [(128, 32, 8, 1), (128, 64, 8, 1), (256, 32, 8, 1)],
    "keys": [(64, 64, 8, 2), (64, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)],
    "queries": [(64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3)],
}
"""Rows, keys, warps, stages."""
CALLS = 8
WORST = 2e-2
"""Largest difference from the table's tile, as a share of the largest number: bf16 sums in another order."""


def main() -> None:
    """Time every candidate of the kernels named, or of all, on the texts that they serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(CANDIDATES)}; all if none is named")
    kinds = parser.parse_args().kinds or list(CANDIDATES)
    for kind in kinds:
        if kind not in CANDIDATES:
            parser.error(f"kernel {kind!r}: expected some of {', '.join(CANDIDATES)}")
    device = torch.device("cuda", 0)
    table = tiles.TABLE[tiles.architecture_of(device)]
    rows: list[dict[str, Any]] = []
    for name, lengths in TEXTS.items():
        inputs = inputs_of(lengths, device)
        base, before = computed(inputs), timed(inputs)
        for kind in kinds:
            own = table[kind][HEAD_DIM]
            for candidate in CANDIDATES[kind]:
                if not all(serves(kind, lengths, tile.rows) for tile in (own, tiles.Tile(*candidate))):
                    continue
                table[kind][HEAD_DIM] = tiles.Tile(*candidate)
                row = {"texts": name, "kind": kind, "table": list(own), "tile": list(candidate), "table_ms": before}
                try:
                    row |= {"ms": timed(inputs), "worst": worst_difference(computed(inputs), base)}
                except Exception as error:  # more shared memory or registers than there are
                    row["failed"] = f"{type(error).__name__}: {error}"[:200]
                table[kind][HEAD_DIM] = own
                print(row, flush=True)
                rows.append(row)
    print(f"result file: {records.write(records.describe('tiles') | {'rows': rows})}")


def serves(kind: str, lengths: list[int], tile_rows: int) -> bool:
    """Whether a kernel runs for these texts, with a tile of so many rows."""
    rows = max(lengths) * (HEADS // GROUPS)
    if kind == "forward short":
        return rows <= tiles.SHORT_ROWS
    if kind == "backward short":
        return rows <= tile_rows
    return rows > tiles.SHORT_ROWS  # no short backward tile is larger


def inputs_of(lengths: list[int], device: torch.device) -> Inputs:
    """One image before each text, norms after the rotation, as the paper has them."""
    count = len(lengths)
    layout = AttentionLayout.build(lengths, [[PATCHES]] * count, [[0]] * count, device=device)
    return random_inputs(layout, heads=HEADS, groups=GROUPS, head_dim=HEAD_DIM, qk_norm="post_rope", rotate=True)


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
