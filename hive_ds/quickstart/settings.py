"""What a quickstart runs with: the default, and a shorter one that only shows that everything works."""

from __future__ import annotations

from dataclasses import dataclass, field

from hive_ds.quickstart.base_models import LanguageModelSize, VisionEncoderSize
from hive_ds.stages import HIVE_STAGES

RECIPE = "tiny"


@dataclass(frozen=True)
class Settings:
    """Sizes of data and base models; the three stages' numbers are the recipe's."""

    scenes: int = 6000
    held_out: int = 600
    text: int = 3200
    captions: int = 6000
    image_size: int = 64
    language_model: LanguageModelSize = field(default_factory=LanguageModelSize)
    vision_encoder: VisionEncoderSize = field(default_factory=VisionEncoderSize)
    overrides: tuple[str, ...] = ()
    """``--set`` options of the training command."""


DEFAULT = Settings()

SMOKE = Settings(
    scenes=64,
    held_out=24,
    text=64,
    captions=64,
    language_model=LanguageModelSize(steps=3, batch=8),
    vision_encoder=VisionEncoderSize(steps=3, batch=8),
    overrides=tuple(f"stages.{stage.name}.steps=3" for stage in HIVE_STAGES),
)
"""The same path in a minute or two; learns nothing."""
