"""A recipe's model with random weights, or on the meta device: every shape and no memory, in seconds at any size."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from hive_ds.config import ModelConfig, Recipe
from hive_ds.cost.known_models import KNOWN_MODELS
from hive_ds.errors import told_as
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.cascaded import CascadedForCausalLM, cascaded_config
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.loading import hive_config, read_language_config, read_vision_config, without_random_weights
from hive_ds.model.vision import vision_class
from hive_ds.stages import VLM_STAGES, Stage
from hive_ds.training.groups import StagePlan, groups_of, plan_stage

_FRESH_WEIGHTS = "none: on the meta device"


def meta_model(recipe: Recipe, stage: int) -> tuple[TrainedModel, StagePlan]:
    """`random_model` on the meta device, attending by the ops of fused kernels as on a GPU."""
    fused = replace(recipe.model, attention_backend="triton", text_attention_backend="triton")
    return random_model(replace(recipe, model=fused), stage, torch.device("meta"))


def random_model(recipe: Recipe, stage: int, device: torch.device) -> tuple[TrainedModel, StagePlan]:
    """The model that a stage trains, with random weights in the recipe's precision, and the stage's plan.

    Sizes come from ``config.json`` of a local folder, else from `KNOWN_MODELS`, else from the hub. A cascaded model's
    embeddings may get one row more in training, for ``<image>``, where its tokenizer has no room for it.

    Raises:
        HiveError: the recipe has no such stage, or a model's size is nowhere to be found.
    """
    described = recipe.stage(str(stage))
    section = recipe.model
    if described in VLM_STAGES:
        assert recipe.vlm is not None
        section = recipe.vlm_model(recipe.vlm.vision_encoder or recipe.model.vision_encoder)
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    build = partial(without_random_weights, _build) if device.type == "meta" else _build
    with device:
        model = build(section, described).to(dtype)
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train(), plan_stage(model, described, groups_of(model), recipe.stages[described.name])


def _build(section: ModelConfig, stage: Stage) -> TrainedModel:
    vision, text = vision_config(section.vision_encoder), text_config(section.language_model)
    with told_as(f"the config of vision encoder {section.vision_encoder!r} makes no model", "sizes that fit together"):
        encoder = vision_class(vision)._from_config(vision)
    with told_as(f"the config of language model {section.language_model!r} makes no model", "sizes that fit together"):
        language_model = AutoModelForCausalLM.from_config(text)
    if section.kind == "hive":
        joined = hive_config(section, vision, text, image_kv=stage.image_kv)
        return HiveForCausalLM(joined, encoder, language_model)
    joined = cascaded_config(
        vision,
        text,
        feature_block=section.feature_block,
        image_token_id=text.vocab_size - 1,
        vision_sha256=_FRESH_WEIGHTS,
    )
    return CascadedForCausalLM(joined, encoder, language_model, attention_backend=section.text_attention_backend)


def vision_config(name: str) -> Any:
    """Config of a vision encoder: of `KNOWN_MODELS`, a folder or the hub."""
    return _known(name) or read_vision_config(name)


def text_config(name: str) -> Any:
    """Config of an LLM, likewise."""
    return _known(name) or read_language_config(name)


def _known(name: str) -> PretrainedConfig | None:
    known = KNOWN_MODELS.get(name)
    return None if known is None or Path(name).is_dir() else AutoConfig.for_model(**known.config)
