"""An ablation on disk: one run folder an arm and seed, each with its whole recipe, so that a run is like any other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hive_ds.ablation.arms import Arm, Depths, make_arms
from hive_ds.checks import check_seeds
from hive_ds.errors import HiveError, told_as
from hive_ds.files import write_whole
from hive_ds.model.loading import read_language_config, read_vision_config
from hive_ds.recipe import dump_recipe, load_recipe
from hive_ds.stages import STAGES

PLAN = "ablation.json"


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path
    """Of the run; its ``recipe.yaml`` is what it trains with."""
    stages: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.name

    @property
    def recipe(self) -> Path:
        """Its recipe, with every value."""
        return self.folder / "recipe.yaml"

    def done(self, stage: int) -> bool:
        """Whether a stage is finished."""
        return (self.folder / f"stage{stage}" / "DONE").is_file()


def make_plan(
    recipe_name: str, overrides: Sequence[str], arm_names: Sequence[str], seeds: Sequence[int], out: Path
) -> list[ArmRun]:
    """Write the recipes of all runs below ``out``; seed by seed, so that a part of them compares too.

    Runs of one seed share everything but what their arm changes: base models, data and the order of the data.

    Raises:
        HiveError: an arm or a seed is wrong, or ``out`` holds another ablation.
    """
    check_seeds(seeds)
    recipe = load_recipe(recipe_name, overrides)
    depths = Depths(
        read_vision_config(recipe.model.vision_encoder).num_hidden_layers,
        read_language_config(recipe.model.language_model).num_hidden_layers,
    )
    arms = make_arms(arm_names, recipe, depths)
    runs = [_make_run(recipe_name, overrides, arm, seed, out) for seed in seeds for arm in arms]
    plan = [{**asdict(run), "folder": run.folder.name} for run in runs]
    _write_once(out / PLAN, json.dumps(plan, indent=1) + "\n")
    return runs


def read_plan(out: Path) -> list[ArmRun]:
    """The runs of the ablation in ``out``.

    Raises:
        HiveError: there is none, or not what `make_plan` wrote.
    """
    if not (out / PLAN).is_file():
        raise HiveError(f"{out}: holds no {PLAN}; expected the folder of an ablation")
    with told_as(str(out / PLAN), "what hive-ds ablate writes"):
        entries = json.loads((out / PLAN).read_text())
        return [ArmRun(one["arm"], one["seed"], out / one["folder"], tuple(one["stages"])) for one in entries]


def _make_run(recipe_name: str, overrides: Sequence[str], arm: Arm, seed: int, out: Path) -> ArmRun:
    recipe = load_recipe(recipe_name, [*overrides, *arm.overrides, f"training.seed={seed}"])
    folder = out / f"{arm.name}-seed{seed}"
    run = ArmRun(arm.name, seed, folder, tuple(stage.number for stage in STAGES if stage.name in recipe.stages))
    _write_once(run.recipe, dump_recipe(replace(recipe, name=f"{recipe.name}-{run.name}")))
    return run


def _write_once(path: Path, text: str) -> None:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    elif path.read_text() != text:
        raise HiveError(f"{path}: is there and says something else; choose another folder, or remove it")
