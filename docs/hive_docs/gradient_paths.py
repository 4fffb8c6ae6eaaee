"""How far the loss is from each block of the encoder, counted in LLM layers and encoder blocks."""

from __future__ import annotations

from collections.abc import Callable

from hive_ds.config import RoutesConfig
from hive_ds.model.cascaded import block_number

Paths = list[tuple[int, int] | None]
"""By block, from the first: LLM layers and encoder blocks on one way; None where no gradient comes."""


def hive_paths(
    routes: RoutesConfig, num_blocks: int, num_layers: int, fewest: Callable[[tuple[int, int]], int]
) -> Paths:
    """Of a HIVE model, the way that has the fewest in the sense of ``fewest``.

    A route to LLM layer l has layers l to the last before it; the encoder blocks above the one asked for come on top.
    """
    pairs = list(zip(routes.vision_blocks, routes.language_layers, strict=True))
    paths: Paths = []
    for block in range(1, num_blocks + 1):
        ways = [(num_layers - layer, start - block) for start, layer in pairs if start >= block]
        paths.append(min(ways, key=fewest, default=None))
    return paths


def sa_paths(feature_block: int, num_blocks: int, num_layers: int) -> Paths:
    """Of a cascaded model: all LLM layers, then every block above."""
    start = block_number(feature_block, num_blocks)
    return [(num_layers, start - block) if block <= start else None for block in range(1, num_blocks + 1)]
