"""The learning rate of a step: linear warm-up, then a cosine down to a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a share of the peak; each optimizer group multiplies it by its own peak."""

    steps: int
    """Optimizer steps of the stage."""
    warmup_ratio: float
    """Share of the steps spent in warm-up."""
    min_lr_ratio: float
    """Floor, as a share of the peak."""

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, rounded up (as Hugging Face does)."""
        return math.ceil(self.steps * self.warmup_ratio)

    def factor(self, step: int) -> float:
        """Share of the peak at ``step``, counted from 0: never zero in warm-up, the floor after the last step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
