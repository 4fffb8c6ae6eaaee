"""Routes: which vision block feeds which LLM layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hive_ds.errors import HiveError


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

    def untrained_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Vision blocks that no loss reaches: all after the last routed one."""
        return tuple(range(self.last_block + 1, num_blocks + 1))
