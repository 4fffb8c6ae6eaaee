"""Results of probes: one score a run, gathered by encoder, task and block."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hive_ds.evaluation.scoring import Share


@dataclass(frozen=True)
class Score:
    """One run of a head: right answers among the test images, the mean of the classes' own shares, how the fit went."""

    seed: int
    share: Share
    mean_per_class: float
    fit: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int, predicted: np.ndarray, truth: np.ndarray, fit: dict[str, float]) -> Score:
        """Compare predicted classes with the true ones; classes that ``truth`` lacks do not count in the mean."""
        right = predicted == truth
        by_class = [float(right[truth == number].mean()) for number in np.unique(truth)]
        return cls(seed, Share(int(right.sum()), len(truth)), statistics.fmean(by_class), fit)

    def as_dict(self) -> dict[str, Any]:
        """As the results file has it."""
        low, high = self.share.interval
        return {
            "seed": self.seed,
            "right": self.share.right,
            "total": self.share.total,
            "accuracy": self.share.value,
            "interval_95": [low, high],
            "mean_per_class": self.mean_per_class,
            **self.fit,
        }


@dataclass(frozen=True)
class BlockResult:
    """Every run of a head on one block of one encoder for one task.

    ``train_size`` and ``test_size`` are images of a run, ``num_classes`` those of the task.
    """

    encoder: str
    task: str
    block: int
    num_classes: int
    train_size: int
    test_size: int
    scores: tuple[Score, ...]

    @property
    def accuracy(self) -> float:
        """Mean over the runs, from 0 to 1."""
        return statistics.fmean(score.share.value for score in self.scores)

    @property
    def std(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None where no seed could change the result."""
        if len(self.scores) < 2:
            return None
        return statistics.stdev(score.share.value for score in self.scores)

    def __str__(self) -> str:
        """``63.1 ± 0.4``, in percent."""
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.accuracy:.1f}{spread}"

    def as_dict(self) -> dict[str, Any]:
        """As the results file has it."""
        return {
            "encoder": self.encoder,
            "task": self.task,
            "block": self.block,
            "num_classes": self.num_classes,
            "train_size": self.train_size,
            "test_size": self.test_size,
            "accuracy": self.accuracy,
            "std": self.std,
            "mean_per_class": statistics.fmean(score.mean_per_class for score in self.scores),
            "runs": [score.as_dict() for score in self.scores],
        }


def best_block(results: Sequence[BlockResult], encoder: str, task: str) -> BlockResult:
    """The block of the highest mean accuracy; of equal ones the first."""
    return max((one for one in results if (one.encoder, one.task) == (encoder, task)), key=lambda one: one.accuracy)
