"""The command line of `hive_ds.train`, apart from it so that reading it imports no torch."""

from __future__ import annotations

import argparse
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hive_ds.cli_parts import Parser
from hive_ds.errors import HiveError
from hive_ds.recipe import load_recipe
from hive_ds.stages import STAGES, VLM_STAGES, next_stage

if TYPE_CHECKING:
    from hive_ds.train import Run


def build_parser() -> argparse.ArgumentParser:
    """The options of ``hive_ds.train``."""
    stages = ", ".join(f"{stage.number} {stage.name}" for stage in STAGES)
    parser = Parser(prog="hive_ds.train", description="Train one stage of a recipe.")
    parser.add_argument("--recipe", required=True, help="name of a recipe, or the path of a YAML file")
    parser.add_argument("--stage", required=True, help=f"number or name: {stages}")
    parser.add_argument(
        "--run",
        "--run-folder",
        required=True,
        help="folder of the run; stage N starts from RUN/stage{N-1}/model, stage 4 from RUN/encoder. Under torchrun "
        "write --run-folder: it takes --run for its own --run-path",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the recipe; repeatable"
    )
    parser.add_argument("--no-next", action="store_true", help="do not say at the end how the next stage is started")
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def next_commands(options: argparse.Namespace, run: Run) -> list[str]:
    """What to run after a stage: the next one with the same options, or the export; nothing under ``--no-next``."""
    if options.no_next:
        return []
    following = next_stage(run.stage, run.recipe.stages)
    if following is None:
        kind, what = ("vlm", "LLaVA-style model") if run.stage in VLM_STAGES else ("encoder", "vision encoder")
        return [f"next: {shlex.join(['hive-ds', 'export', kind, options.run, 'OUT'])}, for a stock {what}"]
    alone_on_cpus = run.device.type == "cpu" and run.world.local_size == run.world.size
    ranks = ["--num_accelerators", str(run.world.size)] if alone_on_cpus else []  # else DeepSpeed starts one there
    words = ["deepspeed", *ranks, "--module", "hive_ds.train", *_recipe_words(options, run)]
    words += ["--stage", str(following.number), "--run", options.run]
    return [f"next, {following.name}: {shlex.join(words)}"]


def _recipe_words(options: argparse.Namespace, run: Run) -> list[str]:
    """The recipe as it was given; where that took ``--set``, the run's own file instead, if it says the same."""
    written = run.folder.path / "recipe.yaml"
    with suppress(HiveError):  # a file of an older version
        if options.set and written.is_file() and load_recipe(written) == run.recipe:
            return ["--recipe", str(written)]
    return ["--recipe", options.recipe, *(word for value in options.set for word in ("--set", value))]


def how_to_go_on(folder: Path) -> str:
    """After a stop of the stage in ``folder``, whose file STOP would also stop the next attempt."""
    file = folder / "STOP"
    return f"{f'remove {file}, then ' * file.exists()}the same command goes on from there"
