"""The ``hive-ds`` command: each subcommand is one call into the library.

Heavy modules are imported inside the commands, so that ``--help`` and ``recipe show`` answer at once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hive_ds import __version__
from hive_ds.cli_ablate import add_ablate_commands, add_compare_command
from hive_ds.cli_analyze import add_analyze_commands
from hive_ds.cli_chat import add_chat_command
from hive_ds.cli_checkpoint import add_checkpoint_commands
from hive_ds.cli_cost import add_cost_command
from hive_ds.cli_data import add_data_commands
from hive_ds.cli_doctor import add_doctor_command
from hive_ds.cli_eval import add_eval_command
from hive_ds.cli_export import add_export_commands
from hive_ds.cli_hosts import add_host_commands
from hive_ds.cli_parts import Parser, add_overrides, command, group
from hive_ds.cli_plan import add_plan_command
from hive_ds.cli_probe import add_probe_command
from hive_ds.cli_report import add_report_command
from hive_ds.cli_supervise import add_supervise
from hive_ds.config import SEED
from hive_ds.errors import HiveError, run_command
from hive_ds.recipe import RECIPES, dump_recipe, load_recipe, recipe_names, resolve


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for wrong input."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["train"]:
        return run_command(lambda: _send_to_launcher(words[1:]))
    args = build_parser().parse_args(words)
    return run_command(lambda: args.run(args), debug=args.debug)


def _send_to_launcher(arguments: Sequence[str]) -> None:
    options = shlex.join(arguments or ("--recipe", "NAME", "--stage", "1", "--run", "FOLDER"))
    raise HiveError(f"hive-ds train: a launcher trains; run: deepspeed --module hive_ds.train {options}")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, in the order of a project: try, prepare, train, take the result, judge it, compare."""
    parser = Parser(
        prog="hive-ds",
        description="Pre-train vision encoders with a language model's supervision (HIVE, arXiv 2604.00086).",
        epilog="Train a stage with: deepspeed --module hive_ds.train --recipe NAME --stage 1 --run FOLDER",
    )
    parser.add_argument("--version", action="version", version=f"hive-ds {__version__}")
    parser.add_argument("--debug", action="store_true", help="print the stack trace of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quickstart(commands)
    recipe = group(commands, "recipe", "list the recipes, or show one with the origin of every value")
    _add_recipe_list(recipe)
    _add_recipe_show(recipe)
    add_data_commands(group(commands, "data", "make training data: generated scenes, or a dataset of your own"))
    add_plan_command(commands)
    add_cost_command(commands)
    add_doctor_command(commands)
    add_host_commands(group(commands, "hosts", "check the hosts of a hostfile, and run on them"))
    add_supervise(commands)
    add_checkpoint_commands(group(commands, "checkpoint", "list, check and move the checkpoints of a run"))
    add_report_command(commands)
    add_export_commands(group(commands, "export", "turn trained models into folders that other libraries load"))
    add_chat_command(commands)
    add_probe_command(commands)
    add_eval_command(commands)
    add_analyze_commands(group(commands, "analyze", "show what reaches the vision encoder, and where the text looks"))
    add_ablate_commands(group(commands, "ablate", "train one recipe in several arms and seeds, and compare them"))
    add_compare_command(commands)
    return parser


def _add_quickstart(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        if not SEED.accepts(args.seed):
            raise HiveError(f"--seed {args.seed}: expected {SEED.expected}")
        from hive_ds.quickstart.pipeline import run_quickstart
        from hive_ds.quickstart.settings import DEFAULT, SMOKE

        run_quickstart(args.out, seed=args.seed, settings=SMOKE if args.smoke else DEFAULT)

    parser = command(
        commands,
        "quickstart",
        run,
        "train a tiny HIVE through its three stages and show what it learned",
        "Draws the data, makes the base models, trains on 2 ranks, exports the encoder and writes a page of results."
        " What OUT holds already is not done again.",
    )
    parser.add_argument(
        "--out", metavar="OUT", type=Path, default=Path("runs/quickstart"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, which learns nothing")


def _add_recipe_list(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        width = max(map(len, recipe_names()))
        for name in recipe_names():
            print(f"{name:<{width}}  {load_recipe(name).description}")
        print(f"\nThey lie in {RECIPES}")

    command(commands, "list", run, "list the recipes that come with the package")


def _add_recipe_show(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        print(dump_recipe(*resolve(args.recipe, args.overrides)), end="")

    parser = command(
        commands,
        "show",
        run,
        "print a recipe with every value and where it came from",
        "The output is YAML, a recipe itself. Precedence: defaults < base recipe < the file < --set.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or path of a .yaml file")
    add_overrides(
        parser,
        "override one value, as model.rope=1d or stages.vision_finetuning.lr=1e-5; the value is YAML; repeatable",
    )
