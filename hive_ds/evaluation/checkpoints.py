"""A checkpoint to evaluate: model, processor, and the hashes that tell which weights were judged."""

from __future__ import annotations

from pathlib import Path

import torch

from hive_ds.errors import HiveError, require_one_of
from hive_ds.export.source import find_source
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.identity import folder_sha256, weights_sha256
from hive_ds.model.loading import load_any
from hive_ds.processing import HiveProcessor
from hive_ds.stages import STAGES

DTYPES = ("float32", "bfloat16", "float16")


def load_checkpoint(source: str | Path, dtype: str = "float32") -> tuple[TrainedModel, HiveProcessor]:
    """Model, in eval mode, and processor of a model's folder or of a run's last finished stage.

    Args:
        source: the folder; HIVE's or a LLaVA-style model.
        dtype: of the weights, one of `DTYPES`.

    Raises:
        HiveError: there is no model, its vision encoder is not the one that it was made with, or an unknown dtype.
    """
    require_one_of("dtype", dtype, DTYPES)
    folder = find_source(source, STAGES).folder
    return load_any(folder, getattr(torch, dtype)), HiveProcessor.from_pretrained(folder)


def tower_sha256(model: TrainedModel, encoder: str | Path | None = None) -> str:
    """The hash of a model's vision encoder.

    Raises:
        HiveError: ``encoder``, an exported one's folder, is another.
    """
    found = weights_sha256(model.vision_encoder.state_dict().items())
    if encoder is not None and (wanted := folder_sha256(encoder)) != found:
        raise HiveError(f"the checkpoint's vision encoder has SHA-256 {found}; expected {wanted}, that of {encoder}")
    return found
