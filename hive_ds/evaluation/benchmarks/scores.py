"""Scores of answers with their standard errors, in the authors' reading and beside it lmms-eval's.

An answer's own score is lmms-eval's, except for MME and POPE, whose authors read answers otherwise (`readings`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hive_ds.errors import HiveError
from hive_ds.evaluation.benchmarks.catalogue import Benchmark
from hive_ds.evaluation.benchmarks.readings import MME_COGNITION, MME_PERCEPTION, mme_says, pope_says_yes
from hive_ds.evaluation.scoring import Z_95

POPE_METRICS = {
    "accuracy": "pope_accuracy",
    "precision": "pope_precision",
    "recall": "pope_recall",
    "f1": "pope_f1_score",
    "yes_ratio": "pope_yes_ratio",
}
"""Our names and lmms-eval's."""
ROUNDING = 1e-9
"""Residuals below are zero: what sums of numbers of about 1 leave."""


@dataclass(frozen=True)
class Answered:
    """One question: its row without the image, the answer, and what lmms-eval's scorer made of it."""

    labels: Mapping[str, Any]
    answer: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """One figure of a benchmark."""

    name: str
    value: float
    maximum: float
    standard_error: float | None
    """Questions about one image counted as one observation; None where there are fewer than two."""
    lmms_eval: float | None = None
    """lmms-eval's figure for the same, where it has one."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval by the normal approximation, within what the score can be; None where nothing varied."""
        if not self.standard_error:
            return None
        spread = Z_95 * self.standard_error
        return max(0.0, self.value - spread), min(self.maximum, self.value + spread)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "maximum": self.maximum,
            "standard_error": self.standard_error,
            "interval_95": self.interval,
            "lmms_eval": self.lmms_eval,
        }


def scores(benchmark: Benchmark, rows: Sequence[Answered], lmms_eval: Mapping[str, float]) -> list[Score]:
    """All figures of a benchmark; those with a dot in their name are parts of others.

    Args:
        benchmark: which one.
        rows: every question, in the order of the data.
        lmms_eval: its own figures, by metric.
    """
    if benchmark.name == "mme":
        return _mme(rows, lmms_eval)
    if benchmark.name == "pope":
        return _pope(benchmark, rows, lmms_eval)
    right = [float(row.metrics["exact_match"]) for row in rows]
    return [Score("accuracy", *ratio(right, [1.0] * len(rows), _clusters(benchmark, rows)), lmms_eval["exact_match"])]


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[Hashable], maximum: float = 1.0
) -> tuple[float, float, float | None]:
    """Sum over sum, the maximum, and the standard error by linearisation over clusters; 0 over nothing.

    A mean is a ratio to ones; precision, recall and F1 are ratios of counts. Clusters are independent of one another,
    and what is inside one may not be (W. G. Cochran, Sampling Techniques, 1977, section 6.3).
    """
    total = math.fsum(denominators)
    if not total:
        return 0.0, maximum, None
    value = math.fsum(numerators) / total
    residuals: dict[Hashable, list[float]] = defaultdict(list)
    for numerator, denominator, cluster in zip(numerators, denominators, clusters, strict=True):
        residuals[cluster].append(numerator - value * denominator)
    count = len(residuals)
    if count < 2:
        return value, maximum, None
    sums = [math.fsum(parts) for parts in residuals.values()]
    squares = math.fsum(part**2 for part in sums if abs(part) > ROUNDING)
    return value, maximum, math.sqrt(count / (count - 1) * squares) / total


def _clusters(benchmark: Benchmark, rows: Sequence[Answered]) -> list[Hashable]:
    return [row.labels[benchmark.cluster] if benchmark.cluster else index for index, row in enumerate(rows)]


def _mme(rows: Sequence[Answered], lmms_eval: Mapping[str, float]) -> list[Score]:
    """Sums over categories: 100 times the accuracy by question plus 100 times that by image (both questions right)."""
    by_category: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        right = mme_says(row.answer) == row.labels["answer"].lower().strip().replace(".", "")
        by_category[row.labels["category"]][row.labels["question_id"]].append(right)
    parts = {}
    for category, images in by_category.items():
        image_scores = [100 * sum(pair) / len(pair) + 100 * all(pair) for pair in images.values()]
        parts[category] = Score(category, *ratio(image_scores, [1.0] * len(images), range(len(images)), 200))
    found = []
    for name, categories in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        own = [parts[category] for category in categories if category in parts]
        if not own:  # none was asked about
            continue
        errors = [part.standard_error for part in own]
        error = None if None in errors else math.sqrt(math.fsum((e or 0.0) ** 2 for e in errors))
        total = math.fsum(part.value for part in own)
        found.append(Score(name, total, 200 * len(own), error, lmms_eval.get(f"mme_{name}_score")))
        found += [Score(f"{name}.{part.name}", part.value, part.maximum, part.standard_error) for part in own]
    return found


def check_pairs(labels: Sequence[Mapping[str, Any]]) -> None:
    """MME is scored by pairs of questions about an image.

    Raises:
        HiveError: an image has another number of questions among those that are asked.
    """
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for row in labels:
        counts[row["category"], row["question_id"]] += 1
    for (category, image), count in counts.items():
        if count != 2:
            raise HiveError(
                f"mme: image {image} ({category}) has {count} of its 2 questions among the first {len(labels)} rows;"
                " expected pairs, so choose another --limit"
            )


def _pope(benchmark: Benchmark, rows: Sequence[Answered], lmms_eval: Mapping[str, float]) -> list[Score]:
    found = [Score(name, *figures, lmms_eval[POPE_METRICS[name]]) for name, figures in _yes_no(benchmark, rows).items()]
    for category in dict.fromkeys(row.labels["category"] for row in rows):
        own = [row for row in rows if row.labels["category"] == category]
        found += [Score(f"{category}.{name}", *figures) for name, figures in _yes_no(benchmark, own).items()]
    return found


def _yes_no(benchmark: Benchmark, rows: Sequence[Answered]) -> dict[str, tuple[float, float, float | None]]:
    """Figures of yes-or-no answers with yes as the positive class; the ratio of yes is that of the answers."""
    said = [float(pope_says_yes(row.answer)) for row in rows]
    true = [float(row.labels["answer"].lower().strip() == "yes") for row in rows]
    both = [s * t for s, t in zip(said, true, strict=True)]
    ones, clusters = [1.0] * len(rows), _clusters(benchmark, rows)
    right = [float(s == t) for s, t in zip(said, true, strict=True)]
    twice, either = [2 * b for b in both], [s + t for s, t in zip(said, true, strict=True)]
    return {
        "accuracy": ratio(right, ones, clusters),
        "precision": ratio(both, said, clusters),
        "recall": ratio(both, true, clusters),
        "f1": ratio(twice, either, clusters),
        "yes_ratio": ratio(said, ones, clusters),
    }
