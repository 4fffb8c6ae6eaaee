"""How far the loss is from each block of the encoder, counted in LLM layers and encoder blocks."""

from __future__ import annotations

from hive_ds.config import RoutesConfig

Paths = list[tuple[int, int] | None]
"""By block, from the first: LLM layers and encoder blocks on the shortest way; None where no gradient comes."""


def hive_paths(routes: RoutesConfig, num_blocks: int, num_layers: int) -> Paths:
    """Of a HIVE model: a route to LLM layer l has layers l to the last before it, then the blocks above the one asked for."""
    pairs = list(zip(routes.vision_blocks, routes.language_layers, strict=True))
    paths: Paths = []
    for block in range(1, num_blocks + 1):
        ways = [(num_layers - layer, start - block) for start, layer in pairs if start >= block]
        paths.append(min(ways, key=sum, default=None))
    return paths


def sa_paths(feature_block: int, num_blocks: int, num_layers: int) -> Paths:
    """Of a cascaded model: all LLM layers, then every block above."""
    start = feature_block if feature_block > 0 else num_blocks + 1 + feature_block
    return [(num_layers, start - block) if block <= start else None for block in range(1, num_blocks + 1)]
