"""A recipe of tiny models: folders with a config and nothing else."""

from __future__ import annotations

from pathlib import Path

from tiny_models import text_config, vision_config

from hive_ds.config import Recipe
from hive_ds.recipe import load_recipe


def tiny_recipe(
    folder: Path, name: str = "tiny", *overrides: str, vision: str = "siglip", text: str = "llama"
) -> Recipe:
    """The recipe ``name`` on an encoder of 4 blocks and an LLM of 5 layers, whose folders hold no weights."""
    vision_config(vision).save_pretrained(folder / "vision")
    text_config(text).save_pretrained(folder / "text")
    return load_recipe(
        name,
        [
            f"model.vision_encoder={folder}/vision",
            f"model.language_model={folder}/text",
            f"vlm.language_model={folder}/text",
            *overrides,
        ],
    )
