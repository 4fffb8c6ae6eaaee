"""``hive-ds plan RECIPE``: which ZeRO profile, how much memory, how long, on a cluster that is not there yet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import add_overrides, command, require_positive
from hive_ds.errors import HiveError
from hive_ds.planning.hardware import GPUS, NETWORKS, gpu_named, network_named


def add_plan_command(commands: Any) -> None:
    """Add the command ``plan``."""
    parser = command(
        commands,
        "plan",
        _run,
        "say which ZeRO profile fits a cluster, and predict memory, traffic, step and run time",
        "Communication is predicted message by message and was checked against real runs; times follow from stated"
        " assumptions about GPUs and networks, none of which was measured (docs/planning.md).",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or path of a .yaml file")
    parser.add_argument("--stage", type=int, default=3, metavar="N", help="stage to plan (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="GPUs on each (default: %(default)s)")
    gpus = f"{', '.join(GPUS)} (default: %(default)s)"
    parser.add_argument("--gpu", default="h200", metavar="NAME", type=str.lower, help=gpus)
    parser.add_argument(
        "--network", default="ib400x8", metavar="NAME", help=f"{', '.join(NETWORKS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--text-length",
        type=int,
        default=128,
        metavar="T",
        help="text tokens of a sample, on average (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="samples of the training data, where it is not on this machine"
    )
    parser.add_argument(
        "--efficiency", type=float, metavar="SHARE", help="share of the peak FLOP/s that is reached (default: 0.4)"
    )
    parser.add_argument(
        "--overlap",
        type=float,
        metavar="SHARE",
        help="share of communication and computing that run at once (default: 0.7)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, assumptions included")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the scaling from 1 to 1,024 GPUs")
    add_overrides(parser)


def _run(args: argparse.Namespace) -> None:
    require_positive(args, "nodes", "gpus_per_node", "text_length", "samples")
    shares = {name: getattr(args, name) for name in ("efficiency", "overlap") if getattr(args, name) is not None}
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise HiveError(f"--{name} {share}: expected a share above 0, at most 1")
    from hive_ds.cost.ledger import stages_of
    from hive_ds.files import write_whole
    from hive_ds.planning.plan import count_samples, plan_profiles, scaling, steps_of
    from hive_ds.planning.report import PlanReport, draw_scaling
    from hive_ds.planning.stage_model import StageModel
    from hive_ds.planning.timing import Assumptions, Cluster
    from hive_ds.recipe import load_recipe
    from hive_ds.training.global_batch import micro_batches
    from hive_ds.versions import made_with

    cluster = Cluster(args.nodes, args.gpus_per_node, gpu_named(args.gpu), network_named(args.network))
    recipe, assumed = load_recipe(args.recipe, args.overrides), Assumptions(**shares)
    for stage in stages_of(recipe):
        if stage.number == args.stage:
            micro_batches(recipe.stages[stage.name], cluster.ranks)  # refused before the model is counted, in seconds
    model = StageModel.of(recipe, args.stage, args.text_length)
    samples = args.samples or count_samples(recipe.data_of(model.plan.stage.name).train)
    plans, steps = plan_profiles(model, cluster, assumed), steps_of(model, samples)
    report = PlanReport(recipe.name, model, args.text_length, cluster, args.gpu, args.network, assumed, plans, steps)
    print("\n".join(report.lines()))
    if args.json:
        write_whole(args.json, json.dumps({**made_with(), **report.as_json()}, indent=2) + "\n")
    if args.picture:
        batch = f"global batch {model.config.global_batch_size:,}"
        title = f"predicted: {recipe.name}, stage {args.stage}, {batch}, {args.gpu} GPUs, network {args.network}"
        write_whole(args.picture, draw_scaling(scaling(model, cluster, assumed), title))
