"""Memory: our tracker against PyTorch's, closed forms against tensors that are there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cost_recipes import tiny_recipe
from tiny_models import random_images, random_tokens, tiny_cascaded, tiny_hive
from torch.distributed._tools.mem_tracker import MemTracker

from hive_ds.cost.counted import watch_step
from hive_ds.cost.ledger import cost_of_stage
from hive_ds.cost.memory import ModelStates, model_state_bytes, zero_buffer_bytes
from hive_ds.cost.memory_watch import MemoryWatch
from hive_ds.cost.model import meta_model, random_model
from hive_ds.cost.workload import Workload
from hive_ds.training.ds_config import read_policy
from hive_ds.training.groups import adamw


def _inputs() -> dict:
    tokens = random_tokens(4 * 60)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "text_lengths": [60] * 4,
        "image_offsets": [[0]] * 4,
        "pixel_values": random_images(4),
    }


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
def test_the_watch_agrees_with_pytorchs_tracker(make: type) -> None:
    """Where everything trains, which MemTracker asks for."""
    model, inputs = make().train(), _inputs()
    model(**inputs)  # the first call makes the rotary frequencies, which stay
    watch = MemoryWatch([*model.parameters(), *model.buffers(), inputs["input_ids"], inputs["pixel_values"]])
    watch.follow_gradients(model.parameters())
    with watch:
        model(**inputs).loss.backward()
    model.zero_grad()

    tracker = MemTracker()
    tracker.track_external(model, inputs["input_ids"], inputs["pixel_values"])
    with tracker:
        model(**inputs).loss.backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    by_name = {str(getattr(kind, "value", kind)): size for kind, size in peak.items()}
    assert by_name["Gradient"] == 0  # the same moment: the loss, before any weight has its gradient
    assert watch.peak == by_name["Activation"] + by_name["Temp"]
    assert watch.temporaries == by_name["Temp"]


@pytest.mark.parametrize("stage", [1, 3])
def test_states_are_those_of_tensors(stage: int, tmp_path: Path) -> None:
    """Without ZeRO in fp32: weights, gradients and Adam's moments of a real step."""
    recipe = tiny_recipe(tmp_path)
    model, plan = random_model(recipe, stage, torch.device("cpu"))
    model(**Workload(2, 7).inputs(model, torch.device("cpu"))).loss.backward()
    optimizer = adamw(plan.groups, recipe.stages[plan.stage.name], fused=False)
    optimizer.step()
    states = model_state_bytes(plan, read_policy("zero0"), ranks=1, precision="fp32")
    assert states.parameters == sum(p.nbytes for p in model.parameters())
    assert states.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    assert states.optimizer == sum(value.nbytes for value in moments)
    assert states.host == 0


def test_what_zero_works_in_is_its_buckets_and_gathered_weights(tmp_path: Path) -> None:
    """Of bf16: two bytes an element. ZeRO 2 fills a second bucket while the first is on its way."""
    _, plan = meta_model(tiny_recipe(tmp_path), 3)
    total = sum(math.prod(shape) for shape in plan.shapes.values())

    def buffers(stage: int, precision: str = "bf16", **more: object) -> int:
        section = {"stage": stage, "reduce_bucket_size": 1000, **more}
        return zero_buffer_bytes(plan, {"zero_optimization": section}, precision=precision)

    assert (buffers(0), buffers(1)) == (0, 2000)
    assert [buffers(2, overlap_comm=overlap) for overlap in (False, True)] == [2000, 4000]
    live = [buffers(3, stage3_max_live_parameters=number) for number in (500, 10**9)]
    assert live == [2000 + 2 * 500, 2000 + 2 * total]
    assert buffers(1, "fp32") == 4000


def test_what_is_offloaded_lies_on_the_host(tmp_path: Path) -> None:
    """With an fp32 gradient of each rank's part on top, which is pinned; one rank holds no weight twice."""
    _, plan = meta_model(tiny_recipe(tmp_path), 3)
    here, optimizer, everything = (
        model_state_bytes(plan, read_policy(name), ranks=2, precision="bf16")
        for name in ("zero3", "zero3_offload_optimizer", "zero3_offload_param")
    )
    part = sum(-(-math.prod(plan.shapes[name]) // 2) for group in plan.groups for name in group.parameters)
    host = here.gradients + here.optimizer + 4 * part
    assert here.optimizer == 12 * part
    assert optimizer == ModelStates(here.parameters, 0, 0, host)
    assert everything == ModelStates(0, 0, 0, host + here.parameters)
    alone = model_state_bytes(plan, read_policy("zero3"), ranks=1, precision="bf16")
    assert alone.parameters == 2 * sum(math.prod(shape) for shape in plan.shapes.values())


@pytest.mark.parametrize(("policy", "reductions"), [("zero1", 2), ("zero2", 4 * 2), ("zero3", 4)])
def test_what_a_rank_sends_in_a_step(policy: str, reductions: int, tmp_path: Path) -> None:
    """Of two ranks, each sends its half of the new weights to the other. An all-reduce sends twice what a
    reduce-scatter does; from ZeRO 2 on it runs in each micro-batch, of which 32 samples are four of at most 5."""
    recipe = tiny_recipe(tmp_path, "tiny", f"training.ds_config={policy}")
    _, plan = meta_model(recipe, 3)
    half = sum(4 * math.prod(plan.shapes[name]) for group in plan.groups for name in group.parameters) / 2
    sent = cost_of_stage(recipe, 3, text_length=9, batch=5, ranks=2).sent
    assert sent == {"weights": half, "gradients": reductions * half}


def test_the_second_copy_of_the_weights_is_shared_by_the_ranks_of_a_node(tmp_path: Path) -> None:
    held = {}
    for policy in ("zero3", "zero3_hpz"):
        recipe = tiny_recipe(tmp_path, "tiny", f"training.ds_config={policy}")
        held[policy] = cost_of_stage(recipe, 3, text_length=9, batch=2, ranks=16).memory["parameters"]
    _, plan = meta_model(recipe, 3)
    assert held["zero3_hpz"] - held["zero3"] == sum(4 * -(-math.prod(shape) // 8) for shape in plan.shapes.values())


def test_activations_grow_with_the_batch_and_shrink_under_checkpointing(tmp_path: Path) -> None:
    counted = {}
    for checkpointing in ("false", "true"):
        model, _ = meta_model(tiny_recipe(tmp_path, "tiny", f"model.gradient_checkpointing={checkpointing}"), 3)
        for batch in (4, 8, 16):
            step = watch_step(model, Workload(batch, 40))
            counted[checkpointing, batch] = step.peak
    assert counted["true", 8] < 0.6 * counted["false", 8]
    assert counted["false", 16] - counted["false", 8] == pytest.approx(
        2 * (counted["false", 8] - counted["false", 4]), rel=1e-3
    )
