"""The packed batch: texts end to end without padding, images end to end beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.text import EncodedSample


@dataclass(frozen=True)
class Normalisation:
    """From levels of 0 to 255 to pixel values, by channel: levels * ``scale`` + ``shift`` in fp32.

    Loaders hand over levels, a quarter of the bytes, and the model's device does the rest.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __call__(self, levels: Tensor) -> Tensor:
        """(I,3,h,w) uint8 -> fp32, on the device that they are on."""
        scale, shift = _channels(self, levels.device)
        return levels.to(torch.float32).mul_(scale).add_(shift)


@lru_cache(maxsize=16)
def _channels(normalise: Normalisation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, (3,1,1): made once, for a copy to a GPU waits for it."""
    scale, shift = (torch.tensor(values, device=device).view(-1, 1, 1) for values in vars(normalise).values())
    return scale, shift


HOST_TENSORS = ("spatial_shapes",)
"""Of an image processor: rows and columns of patches, which the host reads one by one."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class PreparedSample:
    """One sample ready to pack: tokens, labels, processed images (leading dim: images), ``{}`` without any.

    ``bad`` lists the samples that this one replaces.
    """

    id: str
    text: EncodedSample
    images: Mapping[str, Tensor]
    bad: tuple[BadSample, ...] = ()

    def without_loss(self) -> PreparedSample:
        """The same with no token supervised: it takes a place and counts for nothing."""
        return replace(self, text=replace(self.text, labels=[IGNORE_INDEX] * len(self.text.labels)))


@dataclass(frozen=True)
class PackedBatch:
    """Samples end to end, and their images.

    A batch without images has one black image at the end of its first sample, where no token sees it, so that every
    rank calls every module.

    Attributes:
        input_ids: (T,) int64, tokens of all samples.
        labels: (T,) int64, each position's own token, or `IGNORE_INDEX` where it carries no loss.
        text_lengths: tokens of each sample, T in sum.
        image_offsets: media offset of each image of each sample, ascending.
        images: what the image processor makes, images first: sample by sample, within one by (offset, listing).
        sample_ids: of each sample.
        num_images: not counting the black one.
        num_cut: texts that lost their end.
        bad: samples that could not be used, which others here replace.
        normalise: turns ``pixel_values`` that are levels into what the encoder takes; None where they are that.
    """

    input_ids: Tensor
    labels: Tensor
    text_lengths: list[int]
    image_offsets: list[list[int]]
    images: dict[str, Tensor]
    sample_ids: list[str]
    num_images: int
    num_cut: int = 0
    bad: tuple[BadSample, ...] = ()
    normalise: Normalisation | None = None

    @property
    def num_samples(self) -> int:
        """Samples in the batch; len() of its first tensor would count tokens."""
        return len(self.sample_ids)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    def pin_memory(self) -> PackedBatch:
        """The batch with what goes to a GPU in memory that can be copied while the host goes on; for a DataLoader."""
        images = {name: value.pin_memory() for name, value in self.images.items()}
        return replace(self, input_ids=self.input_ids.pin_memory(), images=images)

    def model_inputs(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of the model's packed call on ``device``; floating images are cast to ``dtype``.

        Labels and `HOST_TENSORS` stay: they decide shapes, and the host would wait for the device to tell.
        """
        images = {
            name: value if name in HOST_TENSORS else value.to(device, non_blocking=True)
            for name, value in self.images.items()
        }
        if self.normalise is not None:
            images["pixel_values"] = self.normalise(images["pixel_values"])
        # There, not on the way: with both at once torch casts on the CPU, while the host waits.
        images = {name: value.to(dtype) if value.is_floating_point() else value for name, value in images.items()}
        return {
            "input_ids": self.input_ids.to(device, non_blocking=True),
            "labels": self.labels,
            "text_lengths": self.text_lengths,
            "image_offsets": self.image_offsets,
            **images,
        }


def stretched(batch: PackedBatch, length: int, copies: int) -> PackedBatch:
    """``copies`` of a batch of one sample, its text repeated up to ``length`` tokens, each but the first supervised."""
    ids = batch.input_ids.repeat(-(-length // len(batch.input_ids)))[:length]
    labels = torch.cat([torch.tensor([IGNORE_INDEX]), ids[1:]])
    return PackedBatch(
        input_ids=ids.repeat(copies),
        labels=labels.repeat(copies),
        text_lengths=[length] * copies,
        image_offsets=batch.image_offsets * copies,
        images={name: torch.cat([value] * copies) for name, value in batch.images.items()},
        sample_ids=batch.sample_ids * copies,
        num_images=batch.num_images * copies,
        normalise=batch.normalise,
    )


def collate(
    samples: Sequence[PreparedSample], dummy: Mapping[str, Tensor], normalise: Normalisation | None = None
) -> PackedBatch:
    """Pack ``samples``, shorter texts first, which leaves attention on CPUs least to pad.

    Args:
        samples: of one micro-batch.
        dummy: the one image (`Preprocessor.dummy`) that a batch without images carries.
        normalise: of ``pixel_values`` that are levels.
    """
    samples = sorted(samples, key=lambda sample: len(sample.text.input_ids))
    offsets, images = [], []
    for sample in samples:
        given = sample.text.image_offsets
        order = sorted(range(len(given)), key=given.__getitem__)
        offsets.append([given[index] for index in order])
        if order:
            sorted_already = order == list(range(len(order)))
            images.append({name: value if sorted_already else value[order] for name, value in sample.images.items()})
    num_images = sum(len(given) for given in offsets)
    lengths = [len(sample.text.input_ids) for sample in samples]
    if not images:
        images.append(dict(dummy))
        offsets[0] = [lengths[0]]
    return PackedBatch(
        input_ids=torch.tensor(list(chain.from_iterable(sample.text.input_ids for sample in samples))),
        labels=torch.tensor(list(chain.from_iterable(sample.text.labels for sample in samples))),
        text_lengths=lengths,
        image_offsets=offsets,
        images={name: torch.cat([part[name] for part in images]) for name in images[0]},
        sample_ids=[sample.id for sample in samples],
        num_images=num_images,
        num_cut=sum(sample.text.cut for sample in samples),
        bad=tuple(bad for sample in samples for bad in sample.bad),
        normalise=normalise,
    )
