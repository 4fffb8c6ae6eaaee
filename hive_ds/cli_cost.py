"""``hive-ds cost``: FLOPs and memory of a recipe's stages, computed without weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_ds.cli_parts import add_overrides, command, require_file_to_write, require_positive
from hive_ds.errors import HiveError

if TYPE_CHECKING:
    from hive_ds.config import Recipe
    from hive_ds.cost.ledger import StageCost


def add_cost_command(commands: Any) -> None:
    """Add ``cost`` to the command line."""
    parser = command(
        commands,
        "cost",
        _run,
        "compute what the stages of a recipe cost: FLOPs and memory of a rank",
        "On the meta device: no weights, no GPU, seconds a stage. --measure also runs a step on the GPU.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or path of a .yaml file")
    parser.add_argument(
        "--against", metavar="RECIPE", action="append", default=[], help="show another one beside it; repeatable"
    )
    parser.add_argument(
        "--stage",
        metavar="N",
        dest="stages",
        type=int,
        action="append",
        help="repeatable (default: all that there are)",
    )
    parser.add_argument("--routes", metavar="N", type=int, help="in place of the recipe's, evenly spread")
    parser.add_argument(
        "--text-length", metavar="L", type=int, default=64, help="text tokens of a sample (default: %(default)s)"
    )
    parser.add_argument("--batch", metavar="B", type=int, help="samples of a micro-batch (default: the recipe's)")
    parser.add_argument(
        "--ranks", metavar="R", type=int, default=8, help="ranks that ZeRO splits over (default: %(default)s)"
    )
    add_overrides(parser)
    parser.add_argument(
        "--measure", action="store_true", help="also run and time steps with random weights on the GPU, without ZeRO"
    )
    parser.add_argument(
        "--curves",
        action="store_true",
        help="what becomes of the paper's claims over text length, batch and routes (minutes); needs one --against, of"
        " kind cascaded",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    parser.add_argument("--picture", metavar="PNG", type=Path, help="draw the curves")


def _run(args: argparse.Namespace) -> None:
    from hive_ds.cost.claims import compare, with_routes
    from hive_ds.cost.pictures import draw
    from hive_ds.cost.report import as_dict
    from hive_ds.cost.tables import tables
    from hive_ds.files import write_whole
    from hive_ds.recipe import load_recipe

    require_positive(args, "ranks", "batch")
    require_file_to_write(args.json, args.picture)
    if args.curves and len(args.against) != 1:
        raise HiveError(f"--curves compares two recipes; expected one --against, got {len(args.against)}")
    if args.picture and not args.curves:
        raise HiveError("--picture draws the curves; expected --curves beside it")
    recipes = [load_recipe(name, args.overrides) for name in (args.recipe, *args.against)]
    if args.routes is not None:
        recipes = [with_routes(recipe, args.routes) if recipe.model.kind == "hive" else recipe for recipe in recipes]
    costed = _print_stages(args, recipes)
    measured = _measure(costed) if args.measure else []
    curves = compare(recipes[0], recipes[1], _say) if args.curves else None
    if curves is not None:
        print("\n\n".join(tables(curves)))
    if args.json:
        write_whole(args.json, json.dumps(as_dict([cost for _, cost in costed], measured, curves), indent=1) + "\n")
    if args.picture and curves is not None:
        write_whole(args.picture, draw(curves))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _print_stages(args: argparse.Namespace, recipes: list[Recipe]) -> list[tuple[Recipe, StageCost]]:
    """Cost and print every stage asked for, each beside its recipe; a recipe without it is left out of its table."""
    from hive_ds.cost.ledger import cost_of_stage, stages_of
    from hive_ds.cost.report import print_costs

    numbers = args.stages or [stage.number for stage in stages_of(recipes[0])]
    found: list[tuple[Recipe, StageCost]] = []
    for number in numbers:
        having = [recipe for recipe in recipes if number in [stage.number for stage in stages_of(recipe)]]
        costs = [
            cost_of_stage(recipe, number, text_length=args.text_length, batch=args.batch, ranks=args.ranks)
            for recipe in having
        ]
        if not costs:
            raise HiveError(f"--stage {number}: no recipe here has it")
        print_costs(costs)
        found += zip(having, costs, strict=True)
    return found


def _measure(costed: list[tuple[Recipe, StageCost]]) -> list[dict[str, Any]]:
    """Run a step of everything that was costed on the GPU; nothing where there is none."""
    import torch

    from hive_ds.cost.measured import measure_step
    from hive_ds.cost.workload import Workload

    if not torch.cuda.is_available():
        print("not measured: no GPU")
        return []
    found = []
    for recipe, cost in costed:
        workload = Workload(cost.batch, cost.text_length)
        step = measure_step(recipe, cost.stage, workload, torch.device("cuda"))
        gigabytes = (step.peak_bytes or 0) / 1e9
        print(f"{cost.recipe}, stage {cost.stage}: {1e3 * step.seconds:.1f} ms, {gigabytes:.2f} GB on {step.device}")
        found.append({"recipe": cost.recipe, "stage": cost.stage, **vars(step)})
    return found
