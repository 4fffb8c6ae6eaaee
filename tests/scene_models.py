"""A tiny random HIVE model with a real processor, on the vocabulary of the scenes."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import text_config
from transformers import SiglipImageProcessor
from transformers.models.siglip import SiglipVisionConfig

from hive_ds.data.scenes_samples import text_samples
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.processing import HiveProcessor
from hive_ds.quickstart.base_models import train_tokenizer


def save_scene_model(folder: Path) -> tuple[HiveForCausalLM, HiveProcessor]:
    """Write a random model (4 vision blocks, routes from 1 and 3) with its processor to ``folder`` and return both."""
    texts = [turn.content for sample in text_samples(0, "text", 40) for turn in sample.turns]
    tokenizer = train_tokenizer(texts, 400)
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
    )
    text = text_config(
        "llama",
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = HiveForCausalLM(HiveConfig(vision, text, vision_blocks=(1, 3), language_layers=(1, 3), image_kv="own"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embeddings" not in name:
                parameter.normal_(std=0.25)
    processor = HiveProcessor(SiglipImageProcessor(size={"height": 64, "width": 64}), tokenizer)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
