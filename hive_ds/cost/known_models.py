"""Sizes of models that the recipes name, as published, so that their cost is known without fetching anything.

Read only for a name that is no local folder. Each entry says where its figures stand; a test compares the number of
parameters with the published one. What shapes no weight and no product (dropout, epsilon, tokens) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """A model's size, in the words of its ``config.json``."""

    config: dict[str, Any]
    source: str
    parameters: float
    """Millions, as its authors or its hub page state them; of a vision encoder, of the tower as transformers has it."""


def _siglip(width: int, inner: int, blocks: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }


def _language(
    kind: str, width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, length: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
        **more,
    }


_SIGLIP_PAPER = "arXiv 2303.15343; shapes of ViT-L and So400m as in arXiv 2106.04560 and 2305.13035"
_MOBILE_PAPER = "arXiv 2402.14905, table 9 (600M and larger: appendix); config.json on the model's page"
_QWEN2 = _language("qwen2", 896, 4864, 24, 14, 2, 151936, 32768)

KNOWN_MODELS: dict[str, KnownModel] = {
    "google/siglip-large-patch16-384": KnownModel(_siglip(1024, 4096, 24, 16, 384, 16), _SIGLIP_PAPER, 316),
    "google/siglip-so400m-patch14-384": KnownModel(_siglip(1152, 4304, 27, 16, 384, 14), _SIGLIP_PAPER, 428),
    "openai/clip-vit-large-patch14-336": KnownModel(
        {**_siglip(1024, 4096, 24, 16, 336, 14), "model_type": "clip_vision_model", "projection_dim": 768},
        "arXiv 2103.00020, table 20",
        304,
    ),
    "facebook/MobileLLM-600M": KnownModel(_language("llama", 1152, 3072, 40, 18, 6, 32000, 2048), _MOBILE_PAPER, 603.1),
    "HuggingFaceTB/SmolLM2-360M": KnownModel(
        _language("llama", 960, 2560, 32, 15, 5, 49152, 8192), "arXiv 2502.02737; the model's page", 362
    ),
    "Qwen/Qwen2-0.5B": KnownModel(_QWEN2, "arXiv 2407.10671, table 1", 494),
    "Qwen/Qwen2-0.5B-Instruct": KnownModel(_QWEN2, "arXiv 2407.10671, table 1", 494),
    "Qwen/Qwen3-0.6B-Base": KnownModel(
        _language("qwen3", 1024, 3072, 28, 16, 8, 151936, 32768, head_dim=128), "arXiv 2505.09388, table 1", 596
    ),
}
