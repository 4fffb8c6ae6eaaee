"""``hive-ds ablate ...``: one recipe in several arms and seeds, trained alike and compared in one table."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import add_overrides, command, require_positive
from hive_ds.errors import HiveError

ARMS_HELP = (
    "hive (the recipe itself), sa and base (the paper's baselines), last (every route from the last block), routes-N"
)


def add_ablate_commands(ablate: Any) -> None:
    """Add the commands to the group ``ablate``."""
    _add_run(ablate)
    _add_submit(ablate)
    _add_table(ablate)


def _add_run(ablate: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.ablation.execute import run_all
        from hive_ds.ablation.gather import print_table

        require_positive(args, "jobs")
        launcher = shlex.split(args.launcher) if args.launcher else [sys.executable, "-m", "hive_ds.train"]
        run_all(_plan(args), launcher, after=args.after, jobs=args.jobs)
        print_table(args.out)

    parser = command(
        ablate,
        "run",
        run,
        "train every arm with every seed on this machine, and print the table",
        "What is finished already is not done again. Runs of one seed share data, their order and base models.",
    )
    _add_plan_arguments(parser)
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="what hive_ds.train's arguments are added to, such as 'deepspeed --num_gpus 8 --module hive_ds.train' "
        "(default: one process)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument(
        "--after",
        metavar="COMMAND",
        help="run after the stages of a run, with {run} for its folder, such as "
        "'hive-ds eval {run} --tasks mme,gqa --data bench --out {run}/eval'",
    )


def _add_submit(ablate: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.ablation.execute import submit_all

        submit_all(_plan(args), shlex.split(args.command))
        print(f"when the jobs are done: hive-ds ablate table {args.out}")

    parser = command(
        ablate,
        "submit",
        run,
        "submit every arm with every seed to a cluster",
        "Called again, it submits what is neither done nor queued, as slurm/pipeline.sh does.",
    )
    _add_plan_arguments(parser)
    parser.add_argument(
        "--command",
        default="slurm/pipeline.sh",
        help="what --recipe and --run are added to, such as 'slurm/pipeline.sh --nodes 4' (default: %(default)s)",
    )


def _add_table(ablate: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.ablation.gather import print_table

        print_table(args.out)

    parser = command(
        ablate,
        "table",
        run,
        "print mean and standard deviation over seeds of every score, and write them to OUT/table.json",
        "Scores are validation losses, times, the benchmarks in RUN/eval and whatever RUN/scores.json names.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the ablation")


def _plan(args: argparse.Namespace) -> Any:
    from hive_ds.ablation.plan import make_plan

    return make_plan(args.recipe, args.overrides, args.arms.split(","), _seeds(args.seeds), args.out)


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise HiveError(f"--seeds {text}: expected whole numbers with commas between them, as 0,1,2")
    return [int(part) for part in parts]


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe of a HIVE model, or path of a .yaml file")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder: one run folder an arm and seed below it")
    parser.add_argument("--arms", default="hive,sa,base,last", help=f"{ARMS_HELP} (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="of training (default: %(default)s)")
    add_overrides(parser, "override one value in all arms; repeatable")


def add_compare_command(commands: Any) -> None:
    """Add ``hive-ds compare``."""

    def run(args: argparse.Namespace) -> None:
        from dataclasses import replace

        from hive_ds.compare.pipeline import Comparison
        from hive_ds.compare.settings import PRESETS

        settings = PRESETS[args.preset]
        if args.seeds is not None:
            settings = replace(settings, seeds=tuple(_seeds(args.seeds)))
        print(f"page: {Comparison(args.out, settings).run().resolve()}")

    parser = command(
        commands,
        "compare",
        run,
        "train HIVE and its baselines at small scale and judge their encoders alike",
        "Every arm starts from the same encoder and LLM. What OUT holds already is not done again.",
    )
    parser.add_argument(
        "--out", metavar="OUT", type=Path, default=Path("runs/compare"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--preset", choices=("default", "gpu", "smoke"), default="default", help="sizes (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", help="of training, as 0,1,2,3 (default: the preset's); more tell smaller differences"
    )
