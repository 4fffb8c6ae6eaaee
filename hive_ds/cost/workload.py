"""What a model is costed on: samples of one text length, each with one image before its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hive_ds.errors import HiveError
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.training.flops import BatchSize


@dataclass(frozen=True)
class Workload:
    """A micro-batch of one rank. Every text token is supervised."""

    batch: int
    """Samples."""
    text_length: int
    """Text tokens of each sample."""

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("text length", self.text_length)):
            if value < 1:
                raise HiveError(f"{name} is {value}; expected 1 or more")

    def size(self, model: TrainedModel) -> BatchSize:
        """What it asks of ``model``."""
        tokens = self.batch * self.text_length
        return BatchSize.of([self.text_length] * self.batch, [[0]] * self.batch, tokens, [_patches(model)] * self.batch)

    def inputs(self, model: TrainedModel, device: torch.device) -> dict[str, Any]:
        """Arguments of ``model.forward``, all zeros; labels on the CPU, as loaders leave them: else the host waits."""
        tokens = torch.zeros(self.batch * self.text_length, dtype=torch.int64, device=device)
        labels = tokens if device.type == "meta" else tokens.cpu()
        side = model.config.vision_config.image_size
        pixels: Tensor = torch.zeros(self.batch, 3, side, side, dtype=model.dtype, device=device)
        return {
            "input_ids": tokens,
            "labels": labels,
            "text_lengths": [self.text_length] * self.batch,
            "image_offsets": [[0]] * self.batch,
            "pixel_values": pixels,
        }


def _patches(model: TrainedModel) -> int:
    """Of an image, which is square."""
    vision = model.config.vision_config
    side = getattr(vision, "image_size", None)
    if side is None:
        raise HiveError(
            f"vision encoder of type {vision.model_type!r} takes images of any size; expected one with an image_size"
        )
    return int(side // vision.patch_size) ** 2
