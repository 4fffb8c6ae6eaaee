"""From a folder of MDS shards to packed batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hive_ds.config import DataConfig
from hive_ds.data.batch import PackedBatch, PreparedSample, collate
from hive_ds.data.environment import find_world
from hive_ds.data.images import ImageProcessor, decode_image
from hive_ds.data.preprocess import Preprocessor, make_preprocessor
from hive_ds.data.schema import Sample
from hive_ds.data.text import IMAGE_POSITIONS, TEMPLATES, encode_sample, prepare_tokenizer
from hive_ds.errors import HiveError, require_one_of
from hive_ds.launch.probe import SHM_PER_RANK

if TYPE_CHECKING:
    from hive_ds.data.mds import SampleLoader


@dataclass(frozen=True)
class SampleEncoder:
    """Turns a stored sample into tokens and levels; HiveError, naming the sample, where it cannot be used."""

    tokenizer: PreTrainedTokenizerBase
    preprocess: Preprocessor
    template: str
    image_position: str
    max_length: int

    def __call__(self, sample: Sample) -> PreparedSample:
        """Encode ``sample``."""
        text = encode_sample(
            sample,
            self.tokenizer,
            template=self.template,
            image_position=self.image_position,
            max_length=self.max_length,
        )
        return PreparedSample(sample.id, text, self._pixels(sample.images))

    def _pixels(self, files: Sequence[bytes]) -> Mapping[str, Tensor]:
        if not files:
            return {}
        return self.preprocess.levels([decode_image(file) for file in files])

    def packer(self) -> Callable[[Sequence[PreparedSample]], PackedBatch]:
        """What packs such samples."""
        return partial(collate, dummy=self.preprocess.dummy(), normalise=self.preprocess.normalise)


def check_folders(data: DataConfig) -> None:
    """HiveError where a local folder that a stage reads is not one of MDS shards with samples in it."""
    from hive_ds.data.mds.streams import check_index

    train = [data.train] if isinstance(data.train, str) else data.train
    for folder in (*train, data.validation, data.text_validation):
        if folder and "://" not in folder:
            check_index(folder)


def build_loader(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: ImageProcessor,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    seed: int,
    train: bool,
    folder: str | Mapping[str, float] | None = None,
) -> SampleLoader:
    """Return the loader of `PackedBatch`es of this rank (RANK, WORLD_SIZE, ... as the launcher sets them).

    torch.distributed must be initialised where there are several ranks.

    Args:
        data: the recipe's section, of the stage.
        tokenizer: of the LLM.
        image_processor: of the encoder.
        micro_batch_size: samples of one batch.
        global_batch_size: samples of one optimizer step over all ranks.
        seed: of the order.
        train: endless and shuffled as ``data.shuffle`` says; otherwise each iteration is one pass in the same order.
        folder: one, or several with their weights; by default ``data.train`` or, with ``train`` false,
            ``data.validation``.

    Raises:
        HiveError: a missing or empty folder, sizes that do not divide, an unknown template, streaming not installed.
    """
    from hive_ds.data.mds import SampleDataset, SampleLoader

    _check(data, micro_batch_size, global_batch_size, find_world().size)
    folder = folder or (data.train if train else data.validation)
    if not folder:
        raise HiveError("data.validation is not set: expected an MDS folder to validate on")
    # Texts come one by one: tokenizers' threads would only hand each to one another, for twice the time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoder = SampleEncoder(
        prepare_tokenizer(tokenizer),
        make_preprocessor(image_processor),
        data.template,
        data.image_position,
        data.max_length,
    )
    dataset = SampleDataset(
        {folder: 1.0} if isinstance(folder, str) else folder,
        cache=data.cache,
        cache_limit=data.cache_limit if train else None,
        prepare=encoder,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        shuffle=data.shuffle and train,
        seed=seed,
        balance=data.balance and train,
        train=train,
    )
    return SampleLoader(
        dataset,
        collate_fn=encoder.packer(),
        num_workers=data.num_workers,
        queue=_queue(encoder, micro_batch_size, global_batch_size // find_world().size, data.num_workers),
        endless=train,
        max_bad_share=data.max_bad_share,
    )


def _queue(encoder: SampleEncoder, micro_batch_size: int, share: int, workers: int) -> int:
    """Batches to make ahead: those of a step, which is fetched at once, and one a worker, as /dev/shm allows."""
    image = sum(tensor.nbytes for tensor in encoder.preprocess.dummy().values())
    room = int(SHM_PER_RANK) // (micro_batch_size * image)
    return max(workers, min(max(share // micro_batch_size, workers) + workers, room))


def _check(data: DataConfig, micro_batch_size: int, global_batch_size: int, ranks: int) -> None:
    if micro_batch_size < 1 or global_batch_size % (micro_batch_size * ranks) or global_batch_size < 1:
        raise HiveError(
            f"global_batch_size {global_batch_size}: expected a multiple of micro_batch_size {micro_batch_size} x "
            f"{ranks} ranks"
        )
    require_one_of("data.template", data.template, TEMPLATES)
    require_one_of("data.image_position", data.image_position, IMAGE_POSITIONS)
