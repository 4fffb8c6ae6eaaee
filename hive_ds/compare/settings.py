"""What a comparison runs with: the default for two CPU cores, a larger one for a GPU, and a short one for tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hive_ds.checks import check_seeds
from hive_ds.config import STAGE_NAMES
from hive_ds.quickstart.base_models import LanguageModelSize, VisionEncoderSize
from hive_ds.quickstart.settings import SMOKE as QUICKSTART_SMOKE
from hive_ds.quickstart.settings import Settings

ARMS = ("hive", "sa", "base", "last")


@dataclass(frozen=True)
class CompareSettings:
    """Sizes, arms and seeds."""

    made: Settings
    """Data and base models, and ``--set`` options over recipe `tiny`."""
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    """Runs at a time, each one process."""

    def __post_init__(self) -> None:
        check_seeds(self.seeds)  # before the minutes that scenes and base models take


def _steps(*numbers: int) -> tuple[str, ...]:
    return tuple(f"stages.{stage}.steps={number}" for stage, number in zip(STAGE_NAMES, numbers, strict=True))


_SAVES = ("training.checkpoint_interval=0", "training.validation_interval=0", "training.ds_config=zero0")
"""Runs are short and of one process: one checkpoint at the end."""

DEFAULT = CompareSettings(
    Settings(held_out=1200, overrides=(*_steps(40, 100, 140, 30, 120), *_SAVES)),
)
"""Less than 100 minutes on 2 CPU cores."""

GPU = CompareSettings(
    Settings(
        scenes=60_000,
        held_out=3000,
        text=20_000,
        captions=40_000,
        image_size=128,
        language_model=LanguageModelSize(
            vocabulary=512, layers=16, width=576, heads=9, kv_heads=3, mlp=1536, steps=2000, batch=64, lr=1e-3
        ),
        vision_encoder=VisionEncoderSize(
            image=128, patch=8, blocks=12, width=384, heads=6, mlp=1536, steps=3000, batch=128, lr=5e-4
        ),
        overrides=(
            *_steps(200, 600, 1200, 200, 800),
            *_SAVES,
            "model.routes={vision_blocks: [2, 5, 8, 11], language_layers: [3, 7, 11, 15]}",
            "training.precision=bf16",
            "data.num_workers=4",
            *(f"stages.{stage}.global_batch_size=128" for stage in STAGE_NAMES),
            *(f"stages.{stage}.micro_batch_size=128" for stage in STAGE_NAMES),
            *(f"stages.{stage}.lr=3e-4" for stage in STAGE_NAMES),
        ),
    ),
    jobs=1,
)
"""An encoder of ViT-S size under an LLM of some 60 million parameters, for one GPU."""

SMOKE = CompareSettings(
    # As many scenes as it takes for every answer to every kind of question.
    replace(QUICKSTART_SMOKE, scenes=600, held_out=300, overrides=(*_steps(2, 2, 2, 2, 2), *_SAVES)),
    arms=("hive", "base"),
    seeds=(0, 1),
)
"""The same path in two minutes; learns nothing."""

PRESETS = {"default": DEFAULT, "gpu": GPU, "smoke": SMOKE}
