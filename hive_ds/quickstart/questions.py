"""Held-out question answering: the trained model with the right images, and with images shuffled among samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hive_ds.data.schema import Sample
from hive_ds.errors import told_as
from hive_ds.evaluation.generation import answer_samples, truth, with_shuffled_images
from hive_ds.evaluation.scoring import Share, accuracy_by_kind
from hive_ds.model.loading import load_any
from hive_ds.processing import HiveProcessor

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class QuestionResults:
    """Answers to every question, in the order of the samples."""

    ids: list[str]
    kinds: list[str]
    truths: list[str]
    answers: list[str]
    shuffled_answers: list[str]
    """Of the same model to the same questions, each over another sample's image."""

    @property
    def accuracy(self) -> dict[str, Share]:
        """By kind of question, then ``all``."""
        return accuracy_by_kind(self.kinds, self.answers, self.truths)

    @property
    def shuffled_accuracy(self) -> dict[str, Share]:
        """The same with shuffled images."""
        return accuracy_by_kind(self.kinds, self.shuffled_answers, self.truths)

    @property
    def margin(self) -> float:
        """Right images over shuffled ones, in percentage points over all questions."""
        return 100 * (self.accuracy["all"].value - self.shuffled_accuracy["all"].value)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> QuestionResults:
        """Read what `save` wrote."""
        with told_as(str(path), "answers that this command wrote"):
            return cls(**json.loads(path.read_text()))


def ask(
    model_folder: Path, samples: Sequence[Sample], *, template: str, seed: int, progress: Progress
) -> QuestionResults:
    """Let the model in ``model_folder`` answer ``samples`` (each with ``meta["kind"]``), twice."""
    model = load_any(model_folder)
    processor = HiveProcessor.from_pretrained(model_folder)
    both = [*samples, *with_shuffled_images(samples, seed)]
    answers = answer_samples(model, processor, both, template=template, progress=progress)
    return QuestionResults(
        ids=[sample.id for sample in samples],
        kinds=[sample.meta["kind"] for sample in samples],
        truths=[truth(sample) for sample in samples],
        answers=answers[: len(samples)],
        shuffled_answers=answers[len(samples) :],
    )


def table(results: QuestionResults, chance: dict[str, float]) -> list[list[str]]:
    """Rows (heading first) of accuracy by kind with 95 % intervals; ``chance`` is that of a blind guess by kind."""
    rows = [["question", "right images", "95 %", "shuffled", "95 %", "blind guess", "n"]]
    shuffled = results.shuffled_accuracy
    for kind, share in results.accuracy.items():
        guess = chance.get(kind)
        other = shuffled[kind]
        rows.append(
            [
                kind,
                _percent(share.value),
                _interval(share),
                _percent(other.value),
                _interval(other),
                "" if guess is None else _percent(guess),
                str(share.total),
            ]
        )
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _interval(share: Share) -> str:
    low, high = share.interval
    return f"{100 * low:.0f} to {100 * high:.0f}"
