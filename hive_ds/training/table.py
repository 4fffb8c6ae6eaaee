"""The table that a stage prints before it trains: what trains, how fast, and where it lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from hive_ds.training.engine import Engine
from hive_ds.training.groups import StagePlan


def print_plan(plan: StagePlan, engine: Engine) -> None:
    """Print one row per optimizer group and per frozen module group.

    Args:
        plan: of `plan_stage`.
        engine: holds this rank's part of them.
    """
    sizes = {name: math.prod(shape) for name, shape in plan.shapes.items()}
    on_rank = engine.partition_sizes()
    partitions = engine.world.size if engine.zero_stage == 3 else 1
    where = (str(engine.dtype).removeprefix("torch."), str(partitions))
    table = Table(
        title=f"Stage {plan.stage.number}, {plan.stage.name} (ZeRO {engine.zero_stage})", title_justify="left"
    )
    for column in ("group", "parameters", "trains", "peak LR", "decay", "dtype", "partitions", "on rank 0"):
        table.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
    trained = {name for group in plan.groups for name in group.parameters}
    for group in plan.groups:
        names = list(group.parameters)
        rates = (f"{group.lr:.2g}", f"{group.weight_decay:g}")
        table.add_row(group.name, _sum(sizes, names), "yes", *rates, *where, _sum(on_rank, names))
    for module_group in plan.module_groups:
        names = [name for name, group in plan.group_of.items() if group == module_group.name and name not in trained]
        if names:
            table.add_row(
                module_group.name, _sum(sizes, names), "frozen", "", "", *where, _sum(on_rank, names), style="dim"
            )
    table.add_section()
    table.add_row("trained", _sum(sizes, trained), "", "", "", "", "", _sum(on_rank, trained))
    table.add_row("all", _sum(sizes, sizes), "", "", "", "", "", _sum(on_rank, sizes))
    Console(width=None if Console().is_terminal else 140).print(table)


def _sum(sizes: Mapping[str, int], names: Iterable[str]) -> str:
    return f"{sum(sizes[name] for name in names):,}"
