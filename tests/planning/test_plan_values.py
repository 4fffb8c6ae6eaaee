"""Seconds, units and labels of a plan, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from matplotlib.axes import Axes
from tiny_models import text_config, vision_config

from hive_ds.planning.communication import StepMessages, ZeroPolicy
from hive_ds.planning.hardware import Gpu, Network
from hive_ds.planning.messages import ALL_GATHER, REDUCE_SCATTER, Message
from hive_ds.planning.plan import ProfilePlan, as_json, plan_profile, scaling, steps_of
from hive_ds.planning.report import PlanReport, draw_scaling
from hive_ds.planning.stage_model import StageModel
from hive_ds.planning.timing import Assumptions, Cluster, StepTime, step_time
from hive_ds.recipe import load_recipe
from hive_ds.training.ds_config import read_policy

GPU = Gpu(
    memory=1e11,
    bf16=1e12,
    memory_bandwidth=1e12,
    link_bandwidth=1e11,
    host_bandwidth=1e10,
    fp32=1e11,
    source="round numbers",
)
CLUSTER = Cluster(1, 2, GPU, Network(1e10, 5e-6, "round numbers"))
ASSUMED = Assumptions(efficiency=0.5, bandwidth_share=0.5, overlap=0.75, usable_memory=0.9, threads=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StageModel:
    """Stage 3 of a tiny recipe in bf16, global batch 32."""
    folder = tmp_path_factory.mktemp("models")
    vision_config().save_pretrained(folder / "vision")
    text_config().save_pretrained(folder / "text")
    models = [f"model.vision_encoder={folder}/vision", f"model.language_model={folder}/text"]
    return StageModel.of(load_recipe("tiny", [*models, "training.precision=bf16"]), 3, text_length=16)


@pytest.mark.parametrize(
    ("overlaps", "offloads", "expected"),
    [
        # 2 s compute, 1 s gradients, 0.2 s renewals; 0.06 s of AdamW on the GPU, 1.2 s of copies and 0.35 s off it.
        (True, False, StepTime(2.0, 1.0, 0.2, 0.06, 2 + 0.25 * 1 + 0.2 + 0.06)),
        (False, False, StepTime(2.0, 0.0, 1.2, 0.06, 2 + 1.2 + 0.06)),
        (True, True, StepTime(2.0, 1.0, 0.2, 1.55, 2 + 0.25 * 1 + 0.2 + 1.55)),
    ],
)
def test_time_of_a_step(overlaps: bool, offloads: bool, expected: StepTime) -> None:
    messages = StepMessages([], [Message(ALL_GATHER, 2 * 10**10, 2)], [Message(REDUCE_SCATTER, 10**11, 2)], [])
    found = step_time(1e12, messages, 1e9, CLUSTER, ASSUMED, peak=GPU.bf16, overlaps=overlaps, offloads=offloads)
    assert vars(found) == pytest.approx(vars(expected), rel=1e-5)
    assert found.busy == pytest.approx(2 / expected.total, rel=1e-5)


def test_a_plan_takes_the_recipes_precision_and_the_profiles_share(model: StageModel) -> None:
    """All of AdamW on every rank under ZeRO 0; the peak of fp32 for fp32; 90 % of the memory."""
    plans = {name: plan_profile(model, name, CLUSTER, ASSUMED) for name in ("zero0", "zero1")}
    assert plans["zero0"].time.optimizer == pytest.approx(2 * plans["zero1"].time.optimizer)
    plan = plans["zero1"]
    assert plan.usable == pytest.approx(0.9e11)
    first, further = model.activations
    assert plan.micro_batch > 1
    assert plan.memory["activations"] == first + (plan.micro_batch - 1) * further
    assert plan.time.compute == pytest.approx(16 * model.flops_per_sample / 0.5e12)
    slow = plan_profile(replace(model, precision="fp32"), "zero1", CLUSTER, ASSUMED)
    assert slow.time.compute == pytest.approx(10 * plan.time.compute)
    assert steps_of(replace(model, config=replace(model.config, steps=None, epochs=0.01)), 32) == 1


def test_a_second_copy_of_the_weights_needs_several_nodes() -> None:
    policy = read_policy("zero3_hpz")
    assert [ZeroPolicy.of(policy, ranks, 8).ranks_per_copy for ranks in (8, 16)] == [1, 8]


def test_the_report_says_what_was_planned(model: StageModel) -> None:
    """24 images in 0.2 s; 2 of 4 GB sent by one of two ranks; 36,000 steps in two hours."""
    messages = StepMessages([Message(ALL_GATHER, 4 * 10**9, 2)], [], [], [])
    memory, time = {"parameters": 2e9, "activations": 5e8}, StepTime(0.05, 0.0, 0.0, 0.0, 0.2)
    plan = ProfilePlan("zero1", 2, 4, 3, memory, 3e9, 1.5e9, messages, time)
    report = PlanReport("tiny", model, 16, CLUSTER, "round", "numbers", ASSUMED, [plan], 36_000)
    assert f"(of rank 0 also {4e-9 * model.parameters:.3g} GB while it reads the model)" in "\n".join(report.lines())
    row = next(line for line in report.lines() if line.startswith("* zero1"))
    assert row.split() == ["*", "zero1", "4x3", "2.5", "yes", "1.5", "2.00", "1", "200", "25%", "120"]
    assert report.lines()[-2:] == [
        "a step: 200 ms, 50 of them compute; 120 images/s",
        "the stage: 36000 steps in 2 hours",
    ]
    assert report.as_json()["predicted"]["hours"] == pytest.approx(2)
    found = as_json(plan)
    assert (found["samples_per_second"], found["sent_bytes"]) == (pytest.approx(120), 2e9)
    assert found["memory_bytes"] == {**memory, "peak": 2.5e9, "usable": 3e9, "host": 1.5e9}


def test_the_picture_of_scaling(model: StageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole nodes alone; images per second of all GPUs, and of one as a share of the best."""
    curves = scaling(model, replace(CLUSTER, gpus_per_node=6), ASSUMED)
    assert [plan.ranks for plan in curves["zero1"]] == [1, 2, 4]
    drawn: list[tuple[str, list[int], list[float]]] = []
    plot = Axes.plot

    def record(axes: Axes, xs: Any, ys: Any, *more: Any, **named: Any) -> Any:
        if "label" in named:
            drawn.append((named["label"], list(xs), list(ys)))
        return plot(axes, xs, ys, *more, **named)

    monkeypatch.setattr(Axes, "plot", record)
    draw_scaling({"zero1": curves["zero1"]}, "title")
    rates = [plan.samples_per_second for plan in curves["zero1"]]
    best = max(rate / ranks for rate, ranks in zip(rates, (1, 2, 4), strict=True))
    shares = [rate / ranks / best for rate, ranks in zip(rates, (1, 2, 4), strict=True)]
    assert drawn == [("zero1", [1, 2, 4], pytest.approx(rates)), ("zero1", [1, 2, 4], pytest.approx(shares))]
