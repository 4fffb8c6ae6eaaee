"""The command line of `hive_ds.train`, apart from it so that reading it imports no torch."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from hive_ds.config import Recipe
from hive_ds.stages import STAGES, VLM_STAGES, Stage, next_stage


def build_parser() -> argparse.ArgumentParser:
    """The options of ``hive_ds.train``."""
    numbers = ", ".join(f"{stage.number} {stage.name}" for stage in STAGES)
    parser = argparse.ArgumentParser(prog="hive_ds.train", description="Train one stage of a recipe.")
    parser.add_argument("--recipe", required=True, help="name of a recipe, or the path of a YAML file")
    parser.add_argument("--stage", required=True, type=int, help=numbers)
    parser.add_argument(
        "--run",
        "--run-folder",
        required=True,
        help="folder of the run; stage N starts from RUN/stage{N-1}/model, stage 4 from RUN/encoder. Under torchrun "
        "write --run-folder: it takes --run for its own --run-path",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the recipe; may repeat"
    )
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def next_command(options: argparse.Namespace, recipe: Recipe, stage: Stage) -> str:
    """What to run after a stage: the next one with the same options, or the export."""
    following = next_stage(stage, recipe.stages)
    if following is None:
        kind, what = ("vlm", "LLaVA-style model") if stage in VLM_STAGES else ("encoder", "vision encoder")
        return f"next: {shlex.join(['hive-ds', 'export', kind, options.run, 'OUT'])}, for a stock {what}"
    words = ["deepspeed", "--module", "hive_ds.train", "--recipe", options.recipe, "--stage", str(following.number)]
    words += ["--run", options.run, *(word for value in options.set for word in ("--set", value))]
    return f"next, {following.name}: {shlex.join(words)}"


def how_to_go_on(folder: Path) -> str:
    """After a stop of the stage in ``folder``, whose file STOP would also stop the next attempt."""
    file = folder / "STOP"
    return f"{f'remove {file}, then ' * file.exists()}the same command goes on from there"
