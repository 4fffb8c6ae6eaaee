"""When a run has met so many bad samples that it must not go on."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from hive_ds.data.batch import BadSample
from hive_ds.errors import HiveError

FEWEST = 1000
"""The share is taken of at least so many samples: of fewer, chance decides."""
DEVIATIONS = 3
"""Standard deviations of a Poisson count that chance is granted: data with just the allowed share pass, too."""


def check_bad_share(bad: float, samples: float, max_share: float, found: Sequence[BadSample]) -> None:
    """Refuse more bad samples than ``max_share`` of ``samples`` and chance explain.

    Args:
        bad: bad samples so far, over all ranks.
        samples: all samples so far, over all ranks.
        max_share: ``data.max_bad_share``.
        found: the latest bad ones, of which the last is named.

    Raises:
        HiveError: names share, limit and counts.
    """
    expected = max_share * max(samples, FEWEST)
    allowed = int(expected + DEVIATIONS * sqrt(expected))
    if bad > allowed:
        raise HiveError(
            f"{bad:.0f} bad samples among {samples:.0f} on all ranks, more than data.max_bad_share = {max_share} and "
            f"chance allow ({allowed}); the last, {found[-1].id}: {found[-1].reason}"
        )
