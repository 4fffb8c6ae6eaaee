"""Questions that the model answers now and then while it trains: whether it says the right thing, beside the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from hive_ds.config import DataConfig
from hive_ds.data.schema import Sample
from hive_ds.errors import HiveError
from hive_ds.evaluation.generation import answer_samples, truth
from hive_ds.evaluation.scoring import exact_match
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.processing import HiveProcessor
from hive_ds.training.distributed import World, all_values

MAX_NEW_TOKENS = 16
EXAMPLES = 5


@dataclass(frozen=True)
class Questions:
    """A small set of questions, dealt to the ranks."""

    samples: Sequence[Sample]
    processor: HiveProcessor
    template: str
    batch_size: int
    world: World

    @classmethod
    def load(cls, data: DataConfig, processor: HiveProcessor, batch_size: int, world: World) -> Questions | None:
        """Those of ``data.questions``, if it names any.

        Raises:
            HiveError: none in the folder, or one without an answer or without an image: under ZeRO-3 every rank must
                call the encoder as often as the others.
        """
        if data.questions is None:
            return None
        from hive_ds.data.mds import read_mds  # streaming, which a loop without questions does without

        samples = read_mds(data.questions)
        if not samples:
            raise HiveError(f"data.questions {data.questions}: holds no samples")
        for sample in samples:
            truth(sample)
            if not sample.images:
                raise HiveError(f"data.questions {data.questions}: sample {sample.id!r} has no image; expected one")
        return cls(samples, processor, data.template, batch_size, world)

    def ask(self, model: TrainedModel) -> dict[str, Any]:
        """Share of greedy answers that match, and some of them; every rank must call it, each gets the same."""
        size, rank = self.world.size, self.world.rank
        own = list(self.samples[rank::size])
        rounds = ceil(len(self.samples) / size)
        model.eval()
        answers = answer_samples(
            model,
            self.processor,
            own + [self.samples[0]] * (rounds - len(own)),  # as many as any other rank has
            template=self.template,
            batch_size=self.batch_size,
            max_new_tokens=MAX_NEW_TOKENS,
            synced=size > 1,
        )
        model.train()
        by_rank = all_values(answers)
        said = [by_rank[index % size][index // size] for index in range(len(self.samples))]
        pairs = list(zip(said, map(truth, self.samples), strict=True))
        examples = [
            {"id": sample.id, "answer": answer, "truth": true}
            for sample, (answer, true) in list(zip(self.samples, pairs, strict=True))[:EXAMPLES]
        ]
        right = sum(exact_match(answer, true) for answer, true in pairs)
        return {"share": right / len(pairs), "questions": len(pairs), "examples": examples}
