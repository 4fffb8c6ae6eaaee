"""Tiny random models with a real processor, on the vocabulary of the scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import text_config
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, SiglipImageProcessor, SiglipVisionConfig

from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.aspect import with_aspect
from hive_ds.data.scenes_samples import text_samples
from hive_ds.model.cascaded import CascadedForCausalLM, cascaded_config, processor_values
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.processing import HiveProcessor
from hive_ds.quickstart.base_models import train_tokenizer

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}


def save_scene_model(folder: Path) -> tuple[HiveForCausalLM, HiveProcessor]:
    """Write a random model (4 vision blocks, routes from 1 and 3) with its processor to ``folder`` and return both."""
    tokenizer, text = _language()
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**VISION)
    model = HiveForCausalLM(HiveConfig(vision, text, vision_blocks=(1, 3), language_layers=(1, 3), image_kv="own"))
    _randomise(model)
    processor = HiveProcessor(SiglipImageProcessor(size={"height": 64, "width": 64}), tokenizer)
    return _saved(model, processor, folder)


def save_cascaded_scene_model(
    folder: Path, family: str = "siglip", aspect: str = "square"
) -> tuple[CascadedForCausalLM, HiveProcessor]:
    """The same of a cascaded model, with a SigLIP or a CLIP encoder."""
    tokenizer, text = _language()
    size = {"height": 64, "width": 64}
    if family == "siglip":
        vision, image_processor = SiglipVisionConfig(**VISION), SiglipImageProcessor(size=size)
    else:
        vision = CLIPVisionConfig(**VISION)
        image_processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=size)
    processor = HiveProcessor(with_aspect(image_processor, aspect), tokenizer)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text.vocab_size = image_token_id + 1
    torch.manual_seed(0)
    config = cascaded_config(vision, text, feature_block=-2, image_token_id=image_token_id, vision_sha256="")
    model = CascadedForCausalLM(config)
    _randomise(model)
    processor.stock = processor_values(model.config)
    return _saved(model, processor, folder)


def _language() -> tuple[Any, Any]:
    """A tokenizer on the scenes' words, and the config of an LLM for it."""
    texts = [turn.content for sample in text_samples(0, "text", 40) for turn in sample.turns]
    tokenizer = train_tokenizer(texts, 400)
    return tokenizer, text_config(
        "llama",
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embeddings" not in name:
            parameter.normal_(std=0.25)


def _saved(model: Any, processor: HiveProcessor, folder: Path) -> tuple[Any, HiveProcessor]:
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
