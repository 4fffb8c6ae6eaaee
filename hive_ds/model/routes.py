"""Routes: which vision block feeds which LLM layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hive_ds.errors import HiveError

PUBLISHED_LAYERS = {
    (6, 40): (6, 13, 20, 27, 33, 39),
    (12, 40): (3, 7, 11, 15, 18, 21, 24, 27, 30, 33, 36, 39),
    (23, 40): (*range(2, 33, 2), *range(33, 40)),
    (6, 32): (5, 11, 16, 21, 26, 31),
}
"""(Routes, LLM layers) -> layers of the published scripts, where they are not simply evenly spread."""


@dataclass(frozen=True)
class Routes:
    """Pairs (vision block, LLM layer). Blocks count from 1 (Hugging Face's ``hidden_states`` index), layers from 0.

    Several blocks may feed one layer (their keys are concatenated in the order given here) and one block may feed
    several layers.
    """

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def build(
        cls, vision_blocks: Sequence[int], language_layers: Sequence[int], *, num_blocks: int, num_layers: int
    ) -> Routes:
        """Pair the two lists and check them against the depth of both models.

        Raises:
            HiveError: no route, lists of unequal length, a block or layer out of range, or a pair given twice.
        """
        if len(vision_blocks) != len(language_layers):
            raise HiveError(
                f"routes: {len(vision_blocks)} vision blocks {list(vision_blocks)} but {len(language_layers)} language "
                f"layers {list(language_layers)}; the two lists are read pairwise and must have one length"
            )
        if not vision_blocks:
            raise HiveError("routes: no route given; at least one vision block must feed an LLM layer")
        for block in vision_blocks:
            if not 1 <= block <= num_blocks:
                raise HiveError(f"routes: vision block {block} is out of range; the encoder's are 1 to {num_blocks}")
        for layer in language_layers:
            if not 0 <= layer < num_layers:
                raise HiveError(f"routes: language layer {layer} is out of range; the LLM's are 0 to {num_layers - 1}")
        pairs = tuple((int(block), int(layer)) for block, layer in zip(vision_blocks, language_layers, strict=True))
        if len(set(pairs)) < len(pairs):
            twice = next(pair for pair in pairs if pairs.count(pair) > 1)
            raise HiveError(f"routes: block {twice[0]} to layer {twice[1]} is given twice; every pair must be unique")
        return cls(pairs)

    @cached_property
    def blocks_by_layer(self) -> dict[int, tuple[int, ...]]:
        """The vision blocks of each routed LLM layer, in route order."""
        by_layer: dict[int, tuple[int, ...]] = {}
        for block, layer in self.pairs:
            by_layer[layer] = (*by_layer.get(layer, ()), block)
        return by_layer

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Every routed vision block, ascending."""
        return tuple(sorted({block for block, _ in self.pairs}))

    @property
    def last_block(self) -> int:
        """The deepest routed vision block; nothing after it runs or gets a gradient."""
        return self.blocks[-1]


def spread_routes(count: int, num_blocks: int, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Vision blocks and LLM layers of ``count`` routes, evenly spread; the published ones where there are any.

    They end at the last but one block, as the published routes do, and at the last layer.

    Raises:
        HiveError: more routes than blocks (but the last) or layers.
    """
    if not 1 <= count <= min(num_blocks - 1, num_layers):
        raise HiveError(
            f"{count} routes: expected 1 to {min(num_blocks - 1, num_layers)} for {num_blocks} vision blocks (the last "
            f"one is left out) and {num_layers} language layers"
        )
    layers = PUBLISHED_LAYERS.get((count, num_layers), _spread(count, num_layers))
    return _spread(count, num_blocks), layers


def _spread(count: int, depth: int) -> tuple[int, ...]:
    """``count`` numbers at equal distances, from 0 up to ``depth`` - 1, which is the last."""
    return tuple(-(-index * depth // count) - 1 for index in range(1, count + 1))
