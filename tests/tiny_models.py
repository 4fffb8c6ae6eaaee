"""Tiny encoders and LLMs with random weights, built from configs; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from hive_ds.model.attention import HeadRMSNorm
from hive_ds.model.cascaded import CascadedForCausalLM, cascaded_config
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.identity import weights_sha256
from hive_ds.model.vision import vision_class

VOCABULARY = 96
IMAGE_SIZE = 32
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
"""Arguments of ``generate``."""

_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def vision_config(family: str = "siglip") -> transformers.PretrainedConfig:
    """Config of a 4-block encoder with 8-pixel patches on 32-pixel images (4 x 4 patches)."""
    size = {"image_size": IMAGE_SIZE, "patch_size": 8}
    match family:
        case "siglip":
            return transformers.SiglipVisionConfig(**_VISION, **size)
        case "siglip2":
            return transformers.Siglip2VisionConfig(**_VISION, patch_size=8, num_patches=16)
        case "clip":
            return transformers.CLIPVisionConfig(**_VISION, **size)
        case "dinov2":
            return transformers.Dinov2Config(**_VISION, **size, mlp_ratio=2)
        case "dinov2_with_registers":
            return transformers.Dinov2WithRegistersConfig(**_VISION, **size, mlp_ratio=2, num_register_tokens=3)
        case "dinov3":
            return transformers.DINOv3ViTConfig(**_VISION, **size, num_register_tokens=3)
        case "aimv2":
            return transformers.Aimv2VisionConfig(**_VISION, **size)
    raise AssertionError(family)


def text_config(family: str = "llama", **changes: object) -> transformers.PretrainedConfig:
    """Config of a 5-layer LLM, 6 query heads over 2 key/value heads of 32."""
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
        "gemma3": transformers.Gemma3TextConfig,
    }
    return classes[family](**{**_TEXT, **changes})


def tiny_encoder(family: str = "siglip", seed: int = 0) -> transformers.PreTrainedModel:
    """A random encoder in eval mode."""
    torch.manual_seed(seed)
    config = vision_config(family)
    return vision_class(config)(config).eval()


def tiny_language_model(family: str = "llama", seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
    """A random LLM in eval mode; norms and biases are random too, so that a skipped one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(text_config(family, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "proj" in name:
                parameter.normal_(std=0.15)
    return model


def tiny_hive(
    language: str = "llama",
    vision: str = "siglip",
    *,
    vision_blocks: tuple[int, ...] = (1, 3),
    language_layers: tuple[int, ...] = (1, 3),
    seed: int = 0,
    text_changes: dict[str, object] | None = None,
    **changes: object,
) -> HiveForCausalLM:
    """A random HIVE model in eval mode; ``changes`` go to `HiveConfig`."""
    encoder = tiny_encoder(vision, seed)
    llm = tiny_language_model(language, seed, **(text_changes or {}))
    config = HiveConfig(
        encoder.config, llm.config, vision_blocks=vision_blocks, language_layers=language_layers, **changes
    )
    model = HiveForCausalLM(config, encoder, llm).eval()
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, HeadRMSNorm):
                module.weight.uniform_(0.5, 1.5)
            elif "image_k_proj" in name or "image_v_proj" in name:
                module.weight.normal_(std=0.15)
    return model


def tiny_cascaded(
    language: str = "llama",
    vision: str = "siglip",
    *,
    feature_block: int = -2,
    seed: int = 0,
    text_changes: dict[str, object] | None = None,
    **changes: object,
) -> CascadedForCausalLM:
    """A random cascaded model in eval mode; ``changes`` go to `CascadedForCausalLM`. Its last token is ``<image>``."""
    encoder = tiny_encoder(vision, seed)
    llm = tiny_language_model(language, seed, **(text_changes or {}))
    torch.manual_seed(seed + 1)
    config = cascaded_config(
        encoder.config,
        llm.config,
        feature_block=feature_block,
        image_token_id=VOCABULARY - 1,
        vision_sha256=weights_sha256(encoder.state_dict().items()),
    )
    return CascadedForCausalLM(config, encoder, llm, **changes).eval()


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 32, 32) noise."""
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def random_tokens(length: int, seed: int = 0) -> torch.Tensor:
    """(length,) tokens that are neither padding nor specials."""
    return torch.randint(3, VOCABULARY - 1, (length,), generator=torch.Generator().manual_seed(seed))


def prompts() -> dict[str, Any]:
    """Two prompts of 9 tokens, with one image and with two."""
    return {
        "input_ids": random_tokens(18).view(2, 9),
        "image_offsets": [[0], [2, 5]],
        "pixel_values": random_images(3),
    }
