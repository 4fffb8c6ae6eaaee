"""What is analysed: a picture with a text, or samples of a dataset, encoded exactly as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from hive_ds.analysis.attention_pictures import token_name
from hive_ds.constants import IGNORE_INDEX, IMAGE_TOKEN
from hive_ds.data.batch import PackedBatch
from hive_ds.data.images import decode_image, read_image_file
from hive_ds.data.loader import SampleEncoder
from hive_ds.data.schema import Sample, Turn
from hive_ds.errors import HiveError
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.language import longest_text
from hive_ds.model.vision import patch_grids
from hive_ds.processing import HiveProcessor


@dataclass(frozen=True)
class Subject:
    """A model under analysis, in eval mode, and how it reads samples.

    Attributes:
        name: what it is called in tables and plots.
        model: HIVE's or a cascaded one.
        processor: its own.
        template: ``plain`` or ``chat``, as it was trained.
    """

    name: str
    model: TrainedModel
    processor: HiveProcessor
    template: str

    @property
    def num_blocks(self) -> int:
        """Blocks of the vision encoder."""
        return int(self.model.config.vision_config.num_hidden_layers)

    def read_by(self, block: int) -> str:
        """What reads a block's features, in words; empty where nothing does."""
        if not isinstance(self.model, HiveForCausalLM):
            return "LLM input" if block in self.model.feature_blocks else ""
        layers = [layer for read, layer in self.model.routes.pairs if read == block]
        return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else ""

    @property
    def longest_text(self) -> int:
        """Text tokens of a sample with one image; in a cascaded model the image's tokens take their share."""
        config, taken = self.model.config, 0
        if not isinstance(self.model, HiveForCausalLM):
            inputs = self.processor.preprocess.dummy()
            grids = patch_grids(config.vision_config, inputs["pixel_values"], inputs.get("spatial_shapes"))
            taken = max(rows * columns for rows, columns in grids)
        return longest_text(config.text_config) - taken

    def batch(self, samples: Sequence[Sample]) -> PackedBatch:
        """``samples`` packed, as the loader packs them.

        Raises:
            HiveError: one does not fit the template, or cannot be read.
        """
        processor = self.processor
        encode = SampleEncoder(
            processor.tokenizer, processor.preprocess, self.template, processor.image_position, self.longest_text
        )
        return encode.packer()([encode(sample) for sample in samples])

    def pictured(self, sample: Sample) -> PackedBatch:
        """``sample`` by itself; HiveError as `batch`, and where it has not exactly one image."""
        if len(sample.images) != 1:
            raise HiveError(f"sample {sample.id!r} has {len(sample.images)} images; its picture expects one")
        return self.batch([sample])

    def token_names(self, batch: PackedBatch) -> list[str]:
        """The text of every token, as `token_name` shows it."""
        return [token_name(self.processor.decode([token], skip_special_tokens=False)) for token in batch.input_ids]

    def supervised(self, batch: PackedBatch) -> list[str]:
        """Names of the tokens that carry loss."""
        labels = batch.labels.tolist()
        return [name for name, label in zip(self.token_names(batch), labels, strict=True) if label != IGNORE_INDEX]


def picture_sample(image: Path, text: str, question: str | None = None) -> Sample:
    """A picture with a caption, or with a question and its answer.

    Args:
        image: file of the picture.
        text: the caption or answer: what the model is to say.
        question: asked before, for a model with template ``chat``; the picture stands on a line before it.

    Raises:
        HiveError: the file is no picture.
    """
    asked = IMAGE_TOKEN if question is None else f"{IMAGE_TOKEN}\n{question}"
    return Sample(image.name, (Turn("user", asked), Turn("assistant", text)), (read_image_file(image),))


def stored_samples(folder: str | Path, most: int) -> list[Sample]:
    """The first ``most`` samples with one image of a local folder of MDS shards.

    Raises:
        HiveError: there is no such folder, or no such sample.
    """
    samples = list(islice(_with_one_image(folder), most))
    if not samples:
        raise HiveError(f"data folder {folder}: holds no sample with one image; expected at least one")
    return samples


def _with_one_image(folder: str | Path) -> Iterator[Sample]:
    from hive_ds.data.mds.reading import open_folder  # streaming is an extra, which pictures do without

    return (sample for sample in open_folder(folder) if len(sample.images) == 1)


def picture_of(sample: Sample) -> Image.Image:
    """The first picture of ``sample``."""
    return decode_image(sample.images[0])
