"""The model of a rank that reads no weights, because it gets those of another."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LlavaConfig

from hive_ds.config import ModelConfig
from hive_ds.model.attention_backends import TrainedModel, set_vision_attention
from hive_ds.model.cascaded import CascadedForCausalLM
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.loading import generating_part, without_random_weights


def unread_model(
    config: HiveConfig | LlavaConfig, generation_config: GenerationConfig | None, wanted: ModelConfig
) -> TrainedModel:
    """The model of another rank, by its config; its weights are memory that was never written, which takes up none.

    Args:
        config: of the other rank's model.
        generation_config: likewise, of `generating_part`.
        wanted: the recipe's ``model`` section.
    """
    config = type(config).from_dict(config.to_dict())  # as from a folder: which attention was chosen is not in there
    model: TrainedModel
    if isinstance(config, HiveConfig):
        model = without_random_weights(HiveForCausalLM, config)
    else:
        backend = wanted.text_attention_backend
        model = without_random_weights(CascadedForCausalLM, config, attention_backend=backend)
    for parameter in model.parameters():
        parameter.data = torch.empty(parameter.shape)
    generating_part(model).generation_config = generation_config
    set_vision_attention(model, wanted.vision_attention)
    return model
