"""A plan in words, as JSON and as a picture; every figure says whether it was read, predicted or assumed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isclose
from typing import Any

from matplotlib.figure import Figure

from hive_ds.planning.hardware import GB, LINK_LATENCY
from hive_ds.planning.plan import ProfilePlan, as_json, best_of
from hive_ds.planning.stage_model import StageModel
from hive_ds.planning.timing import Assumptions, Cluster

COLUMNS = (
    *("profile", "batch x accum.", "GPU GB", "fits", "CPU GB", "sends GB", "messages", "step ms", "computing"),
    "images/s",
)
"""Of the table in a terminal."""
SAME = 0.002
"""Relative difference of speeds that no picture shows."""


@dataclass(frozen=True)
class PlanReport:
    """Everything that was asked and answered about one stage."""

    recipe: str
    model: StageModel
    text_length: int
    cluster: Cluster
    gpu_name: str
    network_name: str
    assumed: Assumptions
    plans: list[ProfilePlan]
    steps: int | None
    """Of the stage."""

    def lines(self) -> list[str]:
        """The report for a terminal."""
        best = best_of(self.plans)
        return [*self._head(), "", *self._table(best), "", *self._verdict(best)]

    def as_json(self) -> dict[str, Any]:
        """The same as data."""
        best = best_of(self.plans)
        stage = self.model.plan.stage
        return {
            "recipe": self.recipe,
            "stage": {"number": stage.number, "name": stage.name},
            "read": {
                "parameters": self.model.parameters,
                "trained": self.model.trained,
                "flops_per_sample": self.model.flops_per_sample,
                "global_batch_size": self.model.config.global_batch_size,
                "precision": self.model.precision,
            },
            "assumed": {
                "text_length": self.text_length,
                "gpu": {"name": self.gpu_name, **asdict(self.cluster.gpu)},
                "network": {"name": self.network_name, **asdict(self.cluster.network)},
                "link_latency": LINK_LATENCY,
                **asdict(self.assumed),
            },
            "predicted": {
                "nodes": self.cluster.nodes,
                "gpus_per_node": self.cluster.gpus_per_node,
                "profiles": [as_json(plan) for plan in self.plans],
                "best": best.profile if best else None,
                "steps": self.steps,
                "hours": self._hours(best),
            },
        }

    def _hours(self, best: ProfilePlan | None) -> float | None:
        return best.time.total * self.steps / 3600 if best and self.steps else None

    def _head(self) -> list[str]:
        model, gpu, network, assumed = self.model, self.cluster.gpu, self.cluster.network, self.assumed
        stage = model.plan.stage
        peak = gpu.bf16 if model.precision == "bf16" else gpu.fp32
        return [
            f"{self.recipe}, stage {stage.number} ({stage.name}) on {self.cluster.nodes} x "
            f"{self.cluster.gpus_per_node} {self.gpu_name}",
            f"read from the recipe and its models: {model.parameters / 1e6:.0f}M parameters, {model.trained / 1e6:.0f}M"
            f" trained; {model.flops_per_sample / 1e12:.3g} TFLOP a sample; global batch "
            f"{model.config.global_batch_size}; {model.precision}",
            f"assumed: {self.text_length} text tokens and one image a sample; {peak / 1e12:.0f} TFLOP/s at "
            f"{assumed.efficiency:.0%}; {assumed.bandwidth_share:.0%} of links of {gpu.link_bandwidth / GB:.0f} GB/s "
            f"a GPU and a network ({self.network_name}) of {network.bandwidth / GB:.3g} GB/s a node; "
            f"{assumed.overlap:.0%} overlap; {assumed.usable_memory:.0%} of {gpu.memory / GB:.0f} GB usable",
            "predicted, not measured: everything below" + self._batch_note(),
            "per GPU: micro-batch x accumulation, peak memory, CPU memory "
            f"(of rank 0 also {4 * model.parameters / GB:.3g} GB while it reads the model); per optimizer step: what a "
            "GPU sends, in how many messages, the time, and the share of it spent computing",
        ]

    def _batch_note(self) -> str:
        if self.model.config.micro_batch_size != "auto":
            return ""
        return "; micro_batch_size is auto: batches are the largest predicted to fit, a run finds its own"

    def _table(self, best: ProfilePlan | None) -> list[str]:
        rows = [COLUMNS, *(_row(plan, plan is best) for plan in self.plans)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]

    def _verdict(self, best: ProfilePlan | None) -> list[str]:
        if best is None:
            return ["no profile fits: more GPUs, shorter texts or model.gradient_checkpointing=true"]
        stage = self.model.plan.stage.name
        lines = [
            f"take: --set training.ds_config={best.profile} --set stages.{stage}.micro_batch_size={best.micro_batch}",
            f"a step: {best.time.total * 1e3:.0f} ms, {best.time.compute * 1e3:.0f} of them compute; "
            f"{best.samples_per_second:.0f} images/s",
        ]
        hours = self._hours(best)
        if hours is None:
            return [*lines, "the stage: unknown, for its data are not here; --samples N says how many there are"]
        return [*lines, f"the stage: {self.steps} steps in {hours:.2g} hours"]


def _row(plan: ProfilePlan, best: bool) -> tuple[str, ...]:
    return (
        f"{'* ' if best else ''}{plan.profile}",
        f"{plan.micro_batch}x{plan.accumulation}",
        f"{plan.peak / GB:.1f}",
        "yes" if plan.fits else "no",
        f"{plan.host_memory / GB:.1f}",
        f"{plan.sent / GB:.2f}",
        str(len(plan.messages.all)),
        f"{plan.time.total * 1e3:.0f}",
        f"{plan.time.busy:.0%}",
        f"{plan.samples_per_second:.0f}",
    )


def merged(curves: Mapping[str, Sequence[ProfilePlan]]) -> dict[str, Sequence[ProfilePlan]]:
    """Profiles that are equally fast on every number of GPUs as one curve, under the names of all."""
    found: list[tuple[list[str], Sequence[ProfilePlan]]] = []
    for name, plans in curves.items():
        same = next((names for names, known in found if _are_same(plans, known)), None)
        if same is None:
            found.append(([name], plans))
        else:
            same.append(name)
    return {", ".join(names): plans for names, plans in found}


def _are_same(plans: Sequence[ProfilePlan], known: Sequence[ProfilePlan]) -> bool:
    """Whether a picture of ``known`` also shows ``plans``, of which there may be fewer."""
    others = {plan.ranks: plan for plan in known}
    return all(
        plan.ranks in others
        and plan.fits == others[plan.ranks].fits
        and isclose(plan.samples_per_second, others[plan.ranks].samples_per_second, rel_tol=SAME)
        for plan in plans
    )


def draw_scaling(curves: Mapping[str, Sequence[ProfilePlan]], title: str) -> bytes:
    """A PNG: images per second and efficiency against GPUs, by profile; hollow where the profile does not fit.

    Profiles are often nearly equal: each line is thinner than the one below it.
    """
    figure = Figure(figsize=(11, 4.6), dpi=100, layout="constrained")
    speed, efficiency = figure.subplots(1, 2)
    alone = [plan.samples_per_second / plan.ranks for plans in curves.values() for plan in plans]
    for number, (name, plans) in enumerate(merged(curves).items()):
        counts = [plan.ranks for plan in plans]
        rates = [plan.samples_per_second for plan in plans]
        shares = [rate / count / max(alone) for rate, count in zip(rates, counts, strict=True)]
        for axes, values in ((speed, rates), (efficiency, shares)):
            axes.plot(counts, values, color=f"C{number}", label=name, linewidth=max(1.0, 4.0 - 0.7 * number))
            for plan, value in zip(plans, values, strict=True):
                filled = f"C{number}" if plan.fits else "white"
                axes.plot([plan.ranks], [value], "o", color=f"C{number}", markerfacecolor=filled, markersize=4)
    for axes, label in ((speed, "images/s"), (efficiency, "images/s per GPU, as a share of the best")):
        axes.set_xscale("log", base=2)
        ticks = sorted({plan.ranks for plans in curves.values() for plan in plans})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("GPUs; hollow: does not fit")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    speed.yaxis.set_major_formatter(lambda rate, _: f"{rate:,.10g}")
    speed.grid(alpha=0.15, which="minor")
    efficiency.set_ylim(0, 1.05)
    efficiency.legend(fontsize=10, loc="lower left")
    figure.suptitle(title, fontsize=11)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()
