"""Models that look at the labels: an oracle, a constant "Yes", and one that is always wrong.

What they score is known beforehand (`theory`), so they show whether data, task and scorer work before any model is
judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lmms_eval.api.instance import Instance

from hive_ds.evaluation.benchmarks.catalogue import BENCHMARKS, Benchmark
from hive_ds.evaluation.benchmarks.checkpoint_model import ChatModel
from hive_ds.evaluation.benchmarks.readings import vqa_normal

CONSTANT = "Yes"
NONSENSE = "no such answer"
KINDS = ("oracle", "constant", "wrong")


class StandIn(ChatModel):
    """One of `KINDS`."""

    def __init__(self, kind: str, device: str | None = None) -> None:
        super().__init__(device)
        self._kind = kind
        self._labels: dict[tuple[str, str], Any] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers without a look at the question or the image."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Instance) -> str:
        if self._kind == "constant":
            return CONSTANT
        _, _, _, row, task, split = request.args
        benchmark = BENCHMARKS[task.removeprefix("hive_")]
        if (task, split) not in self._labels:  # without images, which would be decoded
            self._labels[task, split] = self.task_dict[task][split].select_columns(benchmark.labels)
        answer = right_answer if self._kind == "oracle" else wrong_answer
        return answer(benchmark, self._labels[task, split][row])


def right_answer(benchmark: Benchmark, labels: Mapping[str, Any]) -> str:
    """The answer that scores the most: among ten people's, one that most of them gave."""
    if "choices" in labels:
        return _letter(labels["answer"])
    if "answers" in labels:
        counts = Counter(vqa_normal(answer) for answer in labels["answers"])
        return str(max(labels["answers"], key=lambda answer: counts[vqa_normal(answer)]))
    return str(labels["answer"])


def wrong_answer(benchmark: Benchmark, labels: Mapping[str, Any]) -> str:
    """An answer in the right form that scores nothing."""
    if "choices" in labels:
        return _letter((labels["answer"] + 1) % max(len(labels["choices"]), 2))
    if benchmark.name in ("mme", "pope"):
        return "No" if labels["answer"].lower() == "yes" else "Yes"
    return NONSENSE


def _letter(index: int) -> str:
    return chr(ord("A") + index)
