"""Stages, groups and schedule: what trains, how fast, and that nothing is forgotten."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import random_images, random_tokens, tiny_cascaded, tiny_hive
from torch import nn

from hive_ds.config import STAGE_NAMES, StageConfig
from hive_ds.errors import HiveError
from hive_ds.stages import ModuleGroup, Stage, assign_groups, next_stage, stage_by_number
from hive_ds.training.groups import StagePlan, adamw, groups_of, plan_stage
from hive_ds.training.schedule import Schedule

CONFIG = StageConfig(lr=1e-3, global_batch_size=4, micro_batch_size=1, weight_decay=0.1)
VISION = ("siglip", "siglip2", "clip", "dinov2", "dinov2_with_registers", "dinov3", "aimv2")
LANGUAGE = ("llama", "qwen2", "qwen3", "mistral")


def planned(model: nn.Module, stage: int, config: StageConfig = CONFIG) -> StagePlan:
    return plan_stage(model, stage_by_number(stage), groups_of(model), config)


@pytest.mark.parametrize("vision", VISION)
def test_groups_are_what_a_loss_reaches(vision: str) -> None:
    """With everything unfrozen, the gradient reaches every group but the vision tail, and all of each group."""
    model = tiny_hive(vision=vision, image_kv="own").train()
    group_of = planned(model, 3).group_of
    model.requires_grad_(True)
    images = {"pixel_values": random_images(1)}
    if vision == "siglip2":
        images = {
            "pixel_values": torch.randn(1, 16, 3 * 8 * 8),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[4, 4]]),
        }
    tokens = random_tokens(6)
    model(tokens, labels=tokens, text_lengths=[6], image_offsets=[[0]], **images).loss.backward()
    unreached = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unreached == {name for name, group in group_of.items() if group == "vision_tail"}
    assert unreached


@pytest.mark.parametrize("language", LANGUAGE)
def test_stages_train_what_the_paper_says(language: str) -> None:
    model = tiny_hive(language, image_kv="own", qk_norm="pre_rope")
    routed = [f"language_model.model.layers.{layer}.self_attn." for layer in (1, 3)]
    expected: dict[int, set[str]] = {1: set(), 2: set(), 3: set()}
    for name, _ in model.named_parameters():
        at_route = name.startswith(tuple(routed))
        if name.startswith("projectors.") or (at_route and "_norm." in name):
            expected[1].add(name)
        if name in expected[1] or at_route:
            expected[2].add(name)
        head = name.startswith("vision_encoder.") and (".embeddings." in name or ".layers.3." not in name)
        if name in expected[2] or (head and "post_layernorm" not in name and ".head." not in name):
            expected[3].add(name)
    for stage, names in expected.items():
        plan = planned(model, stage)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == names, stage
        in_rows = [name for group in plan.groups for name in group.parameters]
        assert sorted(in_rows) == sorted(names), "each trained parameter in exactly one optimizer group"
        assert all(group.parameters for group in plan.groups)


@pytest.mark.parametrize("vision", ["siglip", "clip", "dinov2", "dinov2_with_registers", "dinov3", "aimv2"])
@pytest.mark.parametrize("language", ["llama", "qwen3"])
def test_cascaded_stages_train_what_the_paper_says(vision: str, language: str) -> None:
    """Every parameter in one group; what a stage trains gets a gradient, and what it freezes gets none."""
    first = "language_model.model.layers.0.self_attn."
    for number in (1, 2, 3, 4, 5):
        model = tiny_cascaded(language, vision).train()
        plan = plan_stage(model, stage_by_number(number, "cascaded"), groups_of(model), CONFIG)
        tokens = random_tokens(6)
        images = {"image_offsets": [[1]], "pixel_values": random_images(1)}
        model(tokens, labels=tokens, text_lengths=[6], **images).loss.backward()
        reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert reached == {name for group in plan.groups for name in group.parameters}
        assert any(name.startswith("projector.") for name in reached)
        assert any(name.startswith(first) for name in reached) == (number in (2, 3, 5))
        assert any(name.startswith("language_model.") and first not in name for name in reached) == (number == 5)
        in_vision = [name for name in reached if name.startswith("vision_encoder.")]
        assert bool(in_vision) == (number == 3)
        assert not any(".3." in name for name in in_vision), "the last of four blocks comes after the penultimate"


def test_norms_and_biases_do_not_decay() -> None:
    model = tiny_hive("qwen2", image_kv="own")
    for group in planned(model, 3).groups:
        for name in group.parameters:
            vector = "norm" in name or name.endswith("bias")
            assert group.weight_decay == (0.0 if vector else 0.1), name


def test_vision_learning_rate_falls_from_block_to_block() -> None:
    config = replace(CONFIG, vision_layer_decay=0.5, group_lr={"vision_encoder": 8e-3})
    rates = {}
    for group in planned(tiny_hive(image_kv="own"), 3, config).groups:
        for name in group.parameters:
            rates[name] = group.lr
    blocks = [f"vision_encoder.vision_model.encoder.layers.{index}.mlp.fc1.weight" for index in range(3)]
    names = [name for name in blocks if name in rates] or [name.replace(".vision_model", "") for name in blocks]
    assert [rates[name] for name in names] == [2e-3, 4e-3, 8e-3]
    assert next(rate for name, rate in rates.items() if "patch_embedding" in name) == 1e-3
    assert next(rate for name, rate in rates.items() if name.startswith("projectors.")) == 1e-3


def test_numbers_of_adamw_are_the_recipes() -> None:
    config = replace(CONFIG, betas=(0.7, 0.8), eps=1e-3)
    plan = planned(tiny_hive(image_kv="own"), 2, config)
    for group, made in zip(plan.groups, adamw(plan.groups, config, fused=False).param_groups, strict=True):
        found = {key: made[key] for key in ("betas", "eps", "weight_decay", "peak_lr", "lr")}
        assert found == {
            "betas": (0.7, 0.8),
            "eps": 1e-3,
            "weight_decay": group.weight_decay,
            "peak_lr": 1e-3,
            "lr": 0.0,  # until the first step asks for one
        }


def test_rate_of_zero_freezes() -> None:
    model = tiny_hive(image_kv="own")
    plan = planned(model, 2, replace(CONFIG, group_lr={"routed_attention": 0.0}))
    assert plan.trained_groups == {"projectors", "qk_norms", "image_kv"}
    assert not model.language_model.model.layers[1].self_attn.q_proj.weight.requires_grad


def test_a_stage_that_trains_nothing_is_refused() -> None:
    with pytest.raises(HiveError, match="no parameter trains"):
        planned(tiny_hive(), 1, replace(CONFIG, group_lr={"projectors": 0.0, "qk_norms": 0.0}))


def test_strays_are_listed() -> None:
    groups = (ModuleGroup("a", r"a\..+"), ModuleGroup("also_a", r"a\.weight"))
    with pytest.raises(HiveError, match=r"a.weight \(a and also_a\), b.weight \(no group\)"):
        assign_groups(["a.weight", "a.bias", "b.weight"], groups)


def test_mechanism_holds_for_other_models() -> None:
    """A stage is data: groups and what trains may be anything."""
    model = nn.ModuleDict({"projector": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    groups = (ModuleGroup("projector", r"projector\..+"), ModuleGroup("rest", r"(?!projector\.).+"))
    plan = plan_stage(model, Stage(4, "vlm_alignment", ("projector",)), groups, CONFIG)
    assert [group.name for group in plan.groups] == ["projector/decay", "projector/no_decay"]
    assert not model["head"].weight.requires_grad


def test_stage_numbers() -> None:
    for kind in ("hive", "cascaded"):
        assert tuple(stage_by_number(number, kind).name for number in (1, 2, 3, 4, 5)) == STAGE_NAMES
    assert next_stage(stage_by_number(1), STAGE_NAMES) == stage_by_number(2)
    assert next_stage(stage_by_number(3), STAGE_NAMES[:3]) is None
    assert next_stage(stage_by_number(3), (STAGE_NAMES[0], STAGE_NAMES[4])) == stage_by_number(5)
    with pytest.raises(HiveError, match=r"stage 7: expected one of 1 \(connector_pretraining\)"):
        stage_by_number(7)


def test_schedule_warms_up_and_ends_at_the_floor() -> None:
    schedule = Schedule(steps=100, warmup_ratio=0.03, min_lr_ratio=0.1)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[3:]))
    assert schedule.factor(3 + 97 // 2) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 48 / 97)))
    assert [schedule.factor(step) for step in (100, 150)] == pytest.approx([0.1, 0.1])
    begun_steps = Schedule(steps=70, warmup_ratio=0.03, min_lr_ratio=0.0)  # 2.1: a step that has begun is one
    assert [begun_steps.factor(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert Schedule(steps=10, warmup_ratio=0.0, min_lr_ratio=0.0).factor(0) == 1.0
