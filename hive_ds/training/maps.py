"""Gradient and attention maps of one held-out sample, drawn now and then while the model trains.

What draws is imported inside functions: every rank of every run would wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hive_ds.config import DataConfig
from hive_ds.data.schema import Sample
from hive_ds.data.text import encode_sample
from hive_ds.errors import HiveError
from hive_ds.processing import HiveProcessor
from hive_ds.training.distributed import sum_over_ranks
from hive_ds.training.engine import Engine
from hive_ds.training.random_state import random_state, restore_random_state


@dataclass(frozen=True)
class SampleMaps:
    """The sample, and where its pictures go.

    Attributes:
        folder: ``RUN/stageN/maps``.
        sample: with one image.
        processor: of the model.
        template: of the stage's data.
    """

    folder: Path
    sample: Sample
    processor: HiveProcessor
    template: str

    @classmethod
    def load(cls, folder: Path, data: DataConfig, processor: HiveProcessor, interval: int) -> SampleMaps | None:
        """The first sample with one image of ``data.validation`` or, without, of ``data.questions``.

        None where ``interval`` (``training.maps_interval``) is 0.

        Raises:
            HiveError: there is no such sample, or it does not fit the template.
        """
        if not interval:
            return None
        from hive_ds.analysis.samples import stored_samples

        source = data.validation or data.questions
        if source is None:
            raise HiveError(
                f"training.maps_interval is {interval}, but data.validation and data.questions are null; expected a"
                " local MDS folder, whose first sample with one image is looked at"
            )
        (sample,) = stored_samples(source, 1)
        encode_sample(  # a refusal now, not at the first maps
            sample,
            processor.tokenizer,
            template=data.template,
            image_position=data.image_position,
            max_length=data.max_length,
        )
        return cls(folder, sample, processor, data.template)

    def draw(self, engine: Engine, step: int) -> dict[int, float]:
        """Draw both maps on rank 0; the gradient norm by block. Every rank must call it: all compute the same.

        Nothing of the training is touched: no parameter gets a gradient, random states are put back.
        """
        from hive_ds.analysis.gradient_pictures import gradient_maps
        from hive_ds.analysis.samples import Subject
        from hive_ds.analysis.token_pictures import token_maps

        before = random_state()
        engine.model.eval()
        subject = Subject(f"step {step}", engine.model, self.processor, self.template)
        engine.gather_parts()
        gradients = gradient_maps(subject, self.sample)
        engine.release()
        engine.gather_parts()
        attention = token_maps(subject, self.sample)
        engine.model.train()
        restore_random_state(before)
        if engine.world.is_main:
            self.write({"gradients": gradients.figure(), "attention": attention.figure()}, step)
        return gradients.gradients.norms()

    def write(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        """Write the pictures of a step; a full disk costs them, not the training."""
        from hive_ds.analysis.attention_pictures import save_picture

        try:
            self.folder.mkdir(exist_ok=True)
            for name, picture in pictures.items():
                save_picture(picture, self.folder / f"step-{step:06d}-{name}.png")
        except OSError as error:
            tqdm.write(f"warning: step {step}: no maps could be written ({error}), training goes on")


def norms_over_ranks(squares: Mapping[int, Tensor], engine: Engine) -> dict[int, float]:
    """L2 norm, by block, of the gradient of the step's mean loss over all ranks; blocks without gradient left out.

    Args:
        squares: of `watched_gradients`, over this rank's micro-batches.
        engine: that ran them.
    """
    blocks = range(1, engine.model.config.vision_config.num_hidden_layers + 1)
    sums = sum_over_ranks([float(squares.get(block, 0.0)) for block in blocks], engine.device)
    # A rank's loss is its share of the mean over all ranks, times their number.
    return {block: square**0.5 / engine.world.size for block, square in zip(blocks, sums, strict=True) if square}
