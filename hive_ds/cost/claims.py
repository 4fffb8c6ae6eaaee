"""What becomes of the paper's claims about cost (arXiv 2604.00086), over text length, batch, routes and stage.

Against SA the paper reports 0.14x training FLOPs, 59.3 % less peak memory and 3.4x speed. FLOPs and memory are computed
here; speed is not. The ratio of FLOPs says how much faster HIVE is if both run at the same rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from hive_ds.config import Recipe, RoutesConfig
from hive_ds.cost.counted import watch_step
from hive_ds.cost.memory import model_state_bytes, zero_buffer_bytes
from hive_ds.cost.model import meta_model
from hive_ds.cost.workload import Workload
from hive_ds.errors import HiveError
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.routes import spread_routes
from hive_ds.training.ds_config import read_policy
from hive_ds.training.flops import FlopCounter
from hive_ds.training.groups import StagePlan

FLOPS, MEMORY, SPEED = 0.14, 0.593, 3.4
"""The paper's: share of SA's FLOPs, share of SA's peak memory saved, times as fast as SA."""
LIMITS = {"flops": 0.145, "speed": 1 / 3.35}
"""Ratios of FLOPs below which a claim holds: those that round to it, or are better."""
TEXT_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 4, 32)
CAPTION, MICRO_BATCH = 64, 32
"""Text length of the curve over batches, batch of the curve over text lengths."""
ROUTES = (8, 6)
STAGES = (1, 2, 3)
SETUPS = {"one GPU": ("zero0", 1), "8 GPUs, ZeRO-3": ("zero3", 8)}
"""Where memory is computed: name -> policy and ranks."""


@dataclass(frozen=True)
class Arm:
    """One side of the comparison at one stage."""

    model: TrainedModel
    plan: StagePlan
    flops: FlopCounter

    @classmethod
    def of(cls, recipe: Recipe, stage: int) -> Arm:
        """The arm that trains ``recipe``."""
        model, plan = meta_model(recipe, stage)
        return cls(model, plan, FlopCounter(model, plan))

    def parts(self, text_length: int) -> dict[str, float]:
        """Model FLOPs of one sample, by part."""
        return self.flops.parts(Workload(1, text_length).size(self.model))


def with_routes(recipe: Recipe, count: int) -> Recipe:
    """``recipe`` with ``count`` routes, the published ones where there are any."""
    config = meta_model(recipe, STAGES[0])[0].config
    blocks, layers = spread_routes(count, config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    return replace(recipe, model=replace(recipe.model, routes=RoutesConfig(blocks, layers)))


def compare(hive: Recipe, sa: Recipe, say: Callable[[str], None]) -> dict[str, Any]:
    """Curves of both kinds, and the text lengths at which each claim holds; every value is plain, for JSON.

    Raises:
        HiveError: ``hive`` has no routes, or ``sa`` is no cascaded model.
    """
    if hive.model.kind != "hive" or sa.model.kind != "cascaded":
        raise HiveError(
            f"curves compare a recipe of kind hive with one of kind cascaded; got {hive.name} ({hive.model.kind}) and "
            f"{sa.name} ({sa.model.kind})"
        )
    flops, memory, holds = [], [], []
    for stage in STAGES:
        baseline = Arm.of(sa, stage)
        baseline_bytes = _memory_curves(baseline, sa, say)
        for routes in ROUTES:
            recipe = with_routes(hive, routes)
            arm, place = Arm.of(recipe, stage), {"stage": stage, "routes": routes}
            flops += [place | _flop_point(arm, baseline, length) for length in TEXT_LENGTHS]
            holds += [place | found for found in _where_flops_hold(arm, baseline)]
            points = _memory_curves(arm, recipe, say)
            memory += [place | _saved(ours, theirs) for ours, theirs in zip(points, baseline_bytes, strict=True)]
    return {"flops": flops, "memory": memory, "holds": holds}


def _ratio(arm: Arm, baseline: Arm, length: int, *, encoder: bool) -> float:
    totals = []
    for side in (arm, baseline):
        parts = side.parts(length)
        totals.append(sum(parts.values()) - (0 if encoder else parts["vision_encoder"]))
    return totals[0] / totals[1]


def _flop_point(arm: Arm, baseline: Arm, length: int) -> dict[str, Any]:
    return {
        "text_length": length,
        "hive": arm.parts(length),
        "sa": baseline.parts(length),
        "ratio": _ratio(arm, baseline, length, encoder=True),
        "ratio_without_encoder": _ratio(arm, baseline, length, encoder=False),
    }


def _where_flops_hold(arm: Arm, baseline: Arm) -> list[dict[str, Any]]:
    """For both claims, encoder counted or not: the longest text at which it holds (0: none), by bisection."""
    found = []
    for claim, encoder in product(LIMITS, (True, False)):

        def holds(length: int, claim: str = claim, encoder: bool = encoder) -> bool:
            return _ratio(arm, baseline, length, encoder=encoder) < LIMITS[claim]

        found.append({"claim": claim, "encoder_counted": encoder, "up_to": _longest(holds, TEXT_LENGTHS[-1])})
    return found


def _longest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` at which ``holds``; HIVE's advantage shrinks as texts grow."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _workloads() -> list[Workload]:
    by_length = [Workload(MICRO_BATCH, length) for length in TEXT_LENGTHS]
    return by_length + [Workload(batch, CAPTION) for batch in BATCHES if batch != MICRO_BATCH]


def _memory_curves(arm: Arm, recipe: Recipe, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Peak memory of every workload, in every setup."""
    fixed = {name: _fixed_bytes(arm, policy, ranks, recipe) for name, (policy, ranks) in SETUPS.items()}
    points = []
    for workload in _workloads():
        working = watch_step(arm.model, workload).peak
        peaks = {name: size + working for name, size in fixed.items()}
        points.append({"batch": workload.batch, "text_length": workload.text_length, "peaks": peaks})
    say(f"{recipe.name}, stage {arm.plan.stage.number}: memory of {len(points)} workloads")
    return points


def _fixed_bytes(arm: Arm, policy_name: str, ranks: int, recipe: Recipe) -> int:
    policy, precision = read_policy(policy_name), recipe.training.precision
    states = model_state_bytes(arm.plan, policy, ranks=ranks, precision=precision)
    return states.device + zero_buffer_bytes(arm.plan, policy, precision=precision)


def _saved(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    peaks = {name: {"hive": ours["peaks"][name], "sa": theirs["peaks"][name]} for name in SETUPS}
    return {
        "batch": ours["batch"],
        "text_length": ours["text_length"],
        "peaks": peaks,
        "saved": {name: 1 - both["hive"] / both["sa"] for name, both in peaks.items()},
    }
