"""The models of the paper's recipe on the meta device: every shape, no weight, nothing fetched."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, SiglipVisionConfig

from hive_ds.model.cascaded import CascadedForCausalLM, cascaded_config
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.recipe import load_recipe
from hive_ds.stages import VLM_STAGES, Stage, stage_by_number
from hive_ds.training.groups import StagePlan, groups_of, plan_stage

PAPER = "hive-siglip-l-mobilellm-600m"

SIZES: dict[str, PretrainedConfig] = {
    "google/siglip-large-patch16-384": SiglipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=384,
        patch_size=16,
    ),
    "facebook/MobileLLM-600M": LlamaConfig(
        vocab_size=32000,
        hidden_size=1152,
        intermediate_size=3072,
        num_hidden_layers=40,
        num_attention_heads=18,
        num_key_value_heads=6,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2-0.5B-Instruct": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
"""As the models' own ``config.json`` say."""


def paper_plan(number: int, recipe_name: str = PAPER) -> StagePlan:
    """What a stage of a recipe with the paper's models does to every parameter."""
    recipe = load_recipe(recipe_name)
    stage = stage_by_number(number, recipe.model.kind)
    model = _meta_model(recipe, stage)
    return plan_stage(model, stage, groups_of(model), recipe.stages[stage.name])


def _meta_model(recipe: Any, stage: Stage) -> Any:
    part = recipe.vlm_model(recipe.model.vision_encoder) if stage in VLM_STAGES else recipe.model
    vision, text = SIZES[part.vision_encoder], SIZES[part.language_model]
    with torch.device("meta"):
        if part.kind == "hive":
            routes = {"vision_blocks": part.routes.vision_blocks, "language_layers": part.routes.language_layers}
            return HiveForCausalLM(HiveConfig(vision, text, **routes, qk_norm=part.qk_norm, image_kv=stage.image_kv))
        joined = {"feature_block": part.feature_block, "image_token_id": text.vocab_size - 1, "vision_sha256": ""}
        return CascadedForCausalLM(cascaded_config(vision, text, **joined))
