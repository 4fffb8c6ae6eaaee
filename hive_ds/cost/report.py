"""The cost of stages as a table for the terminal, and all of it as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from hive_ds.cost.ledger import StageCost
from hive_ds.versions import made_with

_PARTS = {
    "vision_encoder": "vision encoder",
    "projectors": "projectors",
    "language_model": "LLM, image keys included",
    "head": "LLM head",
}
_MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "temporaries": "temporaries",
    "zero_buffers": "ZeRO's buffers, at most",
}


def print_costs(costs: Sequence[StageCost]) -> None:
    """Print one stage of several recipes side by side, beside each after the first what the first is of it."""
    first = costs[0]
    title = (
        f"Stage {first.stage}, {first.name}: micro-batch of {first.batch} images and texts of {first.text_length}"
        f" tokens, {first.ranks} ranks, {first.policy}, {first.precision}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for cost in costs:
        table.add_column(cost.recipe, justify="right", overflow="fold")
        if cost is not first:
            table.add_column("first / it", justify="right", no_wrap=True)
    for name, value in _rows(costs):
        if value is None:
            table.add_section()
            continue
        cells = [name, f"{value(first):.4g}"]
        for cost in costs[1:]:
            share = f"{value(first) / value(cost):.3f}" if value(cost) else ""
            cells += [f"{value(cost):.4g}", share]
        table.add_row(*cells)
    Console(width=None if Console().is_terminal else 140).print(table)


def _rows(costs: Sequence[StageCost]) -> list[tuple[str, Callable[[StageCost], float] | None]]:
    def part(name: str) -> Callable[[StageCost], float]:
        return lambda cost: cost.model_flops[name] / cost.batch / 1e12

    def category(name: str) -> Callable[[StageCost], float]:
        return lambda cost: cost.memory[name] / 1e9

    rows: list[tuple[str, Callable[[StageCost], float] | None]] = [
        (f"TFLOPs a sample: {label}", part(name)) for name, label in _PARTS.items()
    ]
    rows += [
        ("  all (model FLOPs)", lambda cost: cost.total_flops / cost.batch / 1e12),
        ("  as PyTorch counts them", lambda cost: cost.counted_model_flops / cost.batch / 1e12),
        ("  with what backward repeats (HFU)", lambda cost: cost.hardware_flops / cost.batch / 1e12),
        ("  as PyTorch counts those", lambda cost: cost.counted_hardware_flops / cost.batch / 1e12),
        ("PFLOPs an optimizer step, all ranks", lambda cost: cost.step_flops / 1e15),
        ("", None),
        *((f"GB of a rank: {label}", category(name)) for name, label in _MEMORY.items()),
        ("  peak", lambda cost: cost.peak / 1e9),
        ("GB a rank sends in a step: weights", lambda cost: cost.sent["weights"] / 1e9),
        ("GB a rank sends in a step: gradients", lambda cost: cost.sent["gradients"] / 1e9),
    ]
    if any(cost.host_memory for cost in costs):
        rows.append(("GB of CPU memory a rank", lambda cost: cost.host_memory / 1e9))
    return rows


def as_dict(
    costs: Sequence[StageCost], measured: list[dict[str, Any]], curves: dict[str, Any] | None
) -> dict[str, Any]:
    """The results file: what identifies the figures, then the figures."""
    stages = [
        asdict(cost) | {"total_flops": cost.total_flops, "step_flops": cost.step_flops, "peak": cost.peak}
        for cost in costs
    ]
    return {
        "format": 1,
        **made_with(),
        "measured": measured,
        "stages": stages,
        "curves": curves,
    }
