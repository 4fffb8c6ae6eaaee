"""The self-tests: models whose scores are known, through the whole pipeline on the given data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hive_ds.errors import HiveError
from hive_ds.evaluation.benchmarks.catalogue import Benchmark
from hive_ds.evaluation.benchmarks.runner import Outcome, run_model
from hive_ds.evaluation.benchmarks.stand_ins import KINDS, StandIn
from hive_ds.evaluation.benchmarks.theory import expected

TOLERANCE = 1e-9
"""Between what a stand-in scores and what it must: rounding of sums."""


@dataclass(frozen=True)
class SelfTest:
    """One score of a stand-in beside what theory says; lmms-eval's figure likewise."""

    benchmark: str
    model: str
    score: str
    expected: float
    value: float
    expected_lmms_eval: float
    lmms_eval: float | None

    def check(self) -> None:
        """Compare.

        Raises:
            HiveError: one of the two differs.
        """
        right = self.lmms_eval is not None and abs(self.lmms_eval - self.expected_lmms_eval) <= TOLERANCE
        if not right or not abs(self.value - self.expected) <= TOLERANCE:
            raise HiveError(
                f"self-test of {self.benchmark}: model {self.model} scores {self.score} {self.value} (lmms-eval:"
                f" {self.lmms_eval}); expected {self.expected} ({self.expected_lmms_eval}), so no score can be believed"
            )


def run_self_tests(
    benchmarks: Sequence[Benchmark], tasks: Mapping[str, Any], *, limit: int | None, device: str | None
) -> list[SelfTest]:
    """Run every stand-in; the comparisons, none on other ranks than 0.

    Raises:
        HiveError: a score is not what theory says.
    """
    tests: list[SelfTest] = []
    for kind in KINDS:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # progress of no interest
            outcomes = run_model(StandIn(kind, device), benchmarks, tasks, limit)
        for outcome in outcomes:
            tests += _compare(outcome, kind)
    for test in tests:
        test.check()
    return tests


def _compare(outcome: Outcome, kind: str) -> Iterator[SelfTest]:
    found = {score.name: score for score in outcome.scores}
    theory = expected(outcome.benchmark, [row.labels for row in outcome.rows], kind)
    for name, (official, lmms_eval) in theory.items():
        score = found[name]
        yield SelfTest(outcome.benchmark.name, kind, name, official, score.value, lmms_eval, score.lmms_eval)
