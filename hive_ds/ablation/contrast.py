"""Two arms of an ablation, seed by seed: how far apart they are, and how far apart they would have to be to tell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy.special import nctdtrinc
from scipy.stats import t as student

from hive_ds.ablation.gather import Gathered

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Contrast:
    """A score of ``arm`` less that of ``reference``, over the seeds that both have."""

    name: str
    arm: str
    reference: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean difference."""
        return mean(self.differences)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean, by Student's t over the seeds."""
        spread = student.ppf((1 + LEVEL) / 2, self._freedom) * self._error
        return float(self.mean - spread), float(self.mean + spread)

    @property
    def detectable(self) -> float:
        """Smallest true difference that this many seeds, spread like these, would find in four cases out of five."""
        critical = student.ppf((1 + LEVEL) / 2, self._freedom)
        # Of the noncentral t, whose chance to come out above `critical` is `POWER`.
        return float(nctdtrinc(self._freedom, 1 - POWER, critical)) * self._error

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out zero."""
        low, high = self.interval
        return low > 0 or high < 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "score": self.name,
            "arm": self.arm,
            "reference": self.reference,
            "differences": list(self.differences),
            "mean": self.mean,
            "interval_95": list(self.interval),
            "detectable": self.detectable,
            "differs": self.differs,
        }

    @property
    def _freedom(self) -> int:
        return len(self.differences) - 1

    @property
    def _error(self) -> float:
        return stdev(self.differences) / math.sqrt(len(self.differences))


def contrast(gathered: Gathered, name: str, arm: str, reference: str) -> Contrast | None:
    """The paired differences of a score; None where fewer than two seeds have it in both arms."""
    ours, theirs = gathered.scores[arm], gathered.scores[reference]
    both = [seed for seed in ours if seed in theirs and name in ours[seed] and name in theirs[seed]]
    if len(both) < 2:
        return None
    return Contrast(name, arm, reference, tuple(ours[seed][name] - theirs[seed][name] for seed in both))
