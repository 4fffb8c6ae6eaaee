"""The arms of an ablation: what each changes in one recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hive_ds.config import Recipe
from hive_ds.errors import HiveError
from hive_ds.model.routes import spread_routes
from hive_ds.recipe import override
from hive_ds.stages import HIVE_STAGES

ARMS = ("hive", "sa", "base", "last", "routes-N")
"""Names of arms: the recipe as it is, the paper's two baselines, every route from the last block, N routes."""

SA_CLIP = 1.0
"""Of the paper's SA in every stage (the published scripts)."""


@dataclass(frozen=True)
class Arm:
    """One arm."""

    name: str
    overrides: tuple[str, ...]
    """``--set`` options over the recipe."""


@dataclass(frozen=True)
class Depths:
    """Number of blocks of the vision encoder and of layers of the LLM."""

    blocks: int
    layers: int


def make_arm(name: str, recipe: Recipe, depths: Depths) -> Arm:
    """The arm called ``name`` over ``recipe``, a recipe of a HIVE model.

    Raises:
        HiveError: no arm has that name, or the recipe is not one of a HIVE model.
    """
    routes = recipe.model.routes
    if routes is None:
        raise HiveError(f"recipe {recipe.name}: model.kind is {recipe.model.kind}; ablations start from a hive recipe")
    trained = [stage.name for stage in HIVE_STAGES if stage.name in recipe.stages]
    if name == "hive":
        return Arm(name, ())
    if name == "last":
        layers = tuple(dict.fromkeys(routes.language_layers))  # one that reads several blocks reads this one once
        return Arm(name, (_routes_override([depths.blocks] * len(layers), layers),))
    if name == "sa":
        clips = [f"stages.{stage}.clip={SA_CLIP}" for stage in trained]
        return Arm(name, ("model.kind=cascaded", "model.routes=null", *clips))
    if name == "base":
        if recipe.vlm is None:
            raise HiveError(
                f"recipe {recipe.name} has no section vlm; expected one for arm base, whose untouched encoder only the "
                "stages after it judge"
            )
        untrained = [f"stages.{stage}=null" for stage in trained]
        return Arm(name, (*untrained, override("vlm.vision_encoder", recipe.model.vision_encoder)))
    if match := re.fullmatch(r"routes-(\d+)", name):
        blocks, layers = spread_routes(int(match[1]), depths.blocks, depths.layers)
        return Arm(name, (_routes_override(blocks, layers),))
    raise HiveError(f"arm {name!r}: expected one of {', '.join(ARMS)}, N a number")


def _routes_override(blocks: Sequence[int], layers: Sequence[int]) -> str:
    return f"model.routes={{vision_blocks: {list(blocks)}, language_layers: {list(layers)}}}"


def make_arms(names: Sequence[str], recipe: Recipe, depths: Depths) -> list[Arm]:
    """`make_arm` of every name; each may stand once."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise HiveError(f"arms: {', '.join(twice)} is named more than once; expected each once")
    return [make_arm(name, recipe, depths) for name in names]
