"""Tiny HIVE models to export: every weight is random, so that two exchanged ones show."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tiny_models import IMAGE_SIZE, text_config, tiny_hive

from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM

SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
CROPPED = {"size": {"shortest_edge": 40}, "crop_size": SQUARE}
PROCESSORS = {
    "siglip": transformers.SiglipImageProcessor(size=SQUARE),
    "siglip2": transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=15),
    "clip": transformers.CLIPImageProcessor(**CROPPED),
    "dinov2": transformers.BitImageProcessor(**CROPPED),
    "dinov2_with_registers": transformers.BitImageProcessor(**CROPPED),
    "dinov3": transformers.DINOv3ViTImageProcessorFast(size=SQUARE),
    "aimv2": transformers.CLIPImageProcessor(**CROPPED),
}


def save_hive(folder: Path, family: str = "siglip", **changes: object) -> HiveForCausalLM:
    """Write a HIVE model, routes from blocks 1 and 3 of 4, and its image processor; ``changes`` are of its encoder."""
    model = tiny_hive(vision=family)
    if changes:
        config = type(model.config.vision_config)(**{**model.config.vision_config.to_dict(), **changes})
        model = HiveForCausalLM(HiveConfig(config, text_config(), vision_blocks=(1, 3), language_layers=(1, 3)))
    randomize(model.vision_encoder)
    model.eval().save_pretrained(folder)
    PROCESSORS[family].save_pretrained(folder)
    return model


def randomize(module: torch.nn.Module, seed: int = 7) -> None:
    """Draw every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
