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

_EARLY = 0.75
"""Share of a model's depth. The published routes end at the last layer and the last block but one."""


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
        if wrong := _out_of_range(vision_blocks, language_layers, num_blocks, num_layers):
            raise HiveError(f"routes: {wrong}{_instead(len(vision_blocks), num_blocks, num_layers)}")
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


def early_end(vision_blocks: Sequence[int], language_layers: Sequence[int], num_blocks: int, num_layers: int) -> str:
    """A line about routes that leave out much of the end of a model, as those of a smaller one do; else nothing."""
    ends = (("vision block", max(vision_blocks), num_blocks), ("language layer", max(language_layers), num_layers - 1))
    early = [f"{what} {last} of {depth}" for what, last, depth in ends if last < _EARLY * depth]
    if not early:
        return ""
    return f"the routes end at {' and '.join(early)}{_instead(len(vision_blocks), num_blocks, num_layers)}"


def _out_of_range(
    vision_blocks: Sequence[int], language_layers: Sequence[int], num_blocks: int, num_layers: int
) -> str:
    """Every number that is too small or too large, of both lists; nothing where all fit."""
    lists = (
        ("vision block", "the encoder's", vision_blocks, range(1, num_blocks + 1)),
        ("language layer", "the LLM's", language_layers, range(num_layers)),
    )
    said = []
    for what, whose, given, allowed in lists:
        wrong = [str(number) for number in dict.fromkeys(given) if number not in allowed]
        if wrong:
            many = f"{what}s {', '.join(wrong)} are" if len(wrong) > 1 else f"{what} {wrong[0]} is"
            said.append(f"{many} out of range; {whose} are {allowed[0]} to {allowed[-1]}")
    return "; ".join(said)


def _instead(count: int, num_blocks: int, num_layers: int) -> str:
    """``count`` routes over the whole of both models, or as many as they have room for, as a recipe writes them."""
    count = min(count, num_blocks - 1, num_layers)
    if count < 1:
        return ""
    blocks, layers = spread_routes(count, num_blocks, num_layers)
    return f"; spread evenly: routes: {{vision_blocks: {list(blocks)}, language_layers: {list(layers)}}}"


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
