"""What the stand-ins must score, from the labels alone: counted here, not by any scorer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hive_ds.evaluation.benchmarks.catalogue import Benchmark
from hive_ds.evaluation.benchmarks.readings import MME_COGNITION, MME_PERCEPTION, vqa_normal

Labels = Mapping[str, Any]
Expected = dict[str, tuple[float, float]]
"""By score: the official figure, and lmms-eval's."""


def expected(benchmark: Benchmark, labels: Sequence[Labels], kind: str) -> Expected:
    """The main scores of a stand-in of this kind on these questions."""
    if benchmark.name == "mme":
        return _mme(labels, kind)
    if benchmark.name == "pope":
        return _pope(labels, kind)
    if kind == "wrong":
        accuracy = 0.0
    elif "answers" in benchmark.columns:
        accuracy = _mean([_vqa(row["answers"], kind) for row in labels])
    elif kind == "oracle":
        accuracy = 1.0
    elif "choices" in benchmark.columns:
        accuracy = 0.0  # "Yes" is no letter
    else:
        accuracy = _mean([float(row["answer"].lower().strip(" .") == "yes") for row in labels])
    return {"accuracy": (accuracy, accuracy)}


def _mme(labels: Sequence[Labels], kind: str) -> Expected:
    """A pair of one yes and one no gives a constant 50 of 200: 500 of 2000 for perception, 200 of 800 for cognition."""
    images: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in labels:
        right = kind == "oracle" or (kind == "constant" and row["answer"].lower().strip(" .") == "yes")
        images[row["category"], row["question_id"]].append(right)
    by_category: dict[str, list[float]] = defaultdict(list)
    for (category, _), pair in images.items():
        by_category[category].append({0: 0.0, 1: 50.0, 2: 200.0}[sum(pair)])
    found = {}
    for name, categories in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        own = [_mean(by_category[category]) for category in categories if category in by_category]
        if own:
            found[name] = (sum(own), sum(own))
    return found


def _pope(labels: Sequence[Labels], kind: str) -> Expected:
    """lmms-eval's ratio of yes is that of the labels, whatever the answers are."""
    yes = _mean([float(row["answer"].lower().strip() == "yes") for row in labels])
    accuracy, precision, recall, said = {
        "oracle": (1.0, 1.0, 1.0, yes),
        "constant": (yes, yes, 1.0, 1.0),
        "wrong": (0.0, 0.0, 0.0, 1 - yes),
    }[kind]
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    same = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}
    return {**{name: (value, value) for name, value in same.items()}, "yes_ratio": (said, yes)}


def _vqa(answers: Sequence[str], kind: str) -> float:
    """VQA accuracy of an answer that some of n people gave: mean over the n of min(1, matches among the others / 3)."""
    counts = Counter(vqa_normal(answer) for answer in answers)
    given = max(counts.values()) if kind == "oracle" else counts["yes"]
    others = len(answers) - given
    return (given * min(1.0, (given - 1) / 3) + others * min(1.0, given / 3)) / len(answers)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
