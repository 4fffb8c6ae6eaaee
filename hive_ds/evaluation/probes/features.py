"""Features of every image at several blocks, in one pass over the images; computed once, then read from the cache.

Axes: I image, P patch token, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hive_ds.data.images import decode_image
from hive_ds.data.preprocess import Preprocessor
from hive_ds.errors import HiveError, require_one_of
from hive_ds.evaluation.probes.cache import FeatureCache, FeatureKey, Features, FeatureSink, MemorySink
from hive_ds.evaluation.probes.data import LabelledImages
from hive_ds.evaluation.probes.encoder import ProbeEncoder
from hive_ds.model.vision import encode_images

Kind = Literal["mean", "tokens"]
"""``mean``: (I, D), over an image's patches. ``tokens``: (I, P, D), every patch."""
STORED = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class ExtractSettings:
    """How features are computed and stored; only ``stored`` changes their values beyond rounding.

    ``workers`` are processes that decode and preprocess images, 0: this one.
    """

    batch_size: int = 64
    workers: int = 0
    stored: str = "fp32"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise HiveError(f"batch size {self.batch_size}, workers {self.workers}: expected at least 1 and 0")
        require_one_of("stored type", self.stored, STORED)


DEFAULT = ExtractSettings()


def compute_features(
    encoder: ProbeEncoder,
    images: LabelledImages,
    blocks: Sequence[int],
    kind: Kind,
    settings: ExtractSettings = DEFAULT,
    cache: FeatureCache | None = None,
) -> dict[int, Features]:
    """Features of ``images`` at every one of ``blocks`` (from 1), before the encoder's final norm.

    What the cache holds is not computed again. Without a cache the features stay in memory.

    Raises:
        HiveError: names the image that cannot be read, a block that is not there, or features that are not finite;
            nothing is then cached.
    """
    for block in blocks:
        if not 1 <= block <= encoder.info.num_blocks:
            raise HiveError(f"block {block} of {encoder.info.name}: expected 1 to {encoder.info.num_blocks}")
    keys = {block: _key(encoder, images, block, kind, settings) for block in blocks}
    found = {block: entry for block, key in keys.items() if cache and (entry := cache.find(key)) is not None}
    missing = [block for block in keys if block not in found]
    if missing:
        with contextlib.ExitStack() as stack:
            sinks = {block: stack.enter_context(_sink(cache, keys[block], images.size)) for block in missing}
            _fill(encoder, images, kind, settings, sinks)
            found |= {block: sink.finish() for block, sink in sinks.items()}
    return {block: found[block] for block in blocks}


def _sink(cache: FeatureCache | None, key: FeatureKey, size: int) -> contextlib.AbstractContextManager[FeatureSink]:
    return cache.write(key, size) if cache else contextlib.nullcontext(MemorySink())


def _key(
    encoder: ProbeEncoder, images: LabelledImages, block: int, kind: Kind, settings: ExtractSettings
) -> FeatureKey:
    return FeatureKey(
        weights=encoder.info.exact_sha256,
        config=encoder.info.config_sha256,
        processor=encoder.info.processor_sha256,
        images=images.fingerprint,
        block=block,
        kind=kind,
        computed=encoder.info.dtype,
        stored=settings.stored,
    )


def _fill(
    encoder: ProbeEncoder,
    images: LabelledImages,
    kind: Kind,
    settings: ExtractSettings,
    sinks: Mapping[int, FeatureSink],
) -> None:
    """Run the encoder once over ``images`` and hand every block's features to its sink."""
    bar = tqdm(
        total=images.size, desc=f"{encoder.info.name}: {images.name}", unit="image", disable=not settings.progress
    )
    with bar:
        for inputs in _batches(images, encoder.preprocess, settings):
            size = len(inputs["pixel_values"])
            by_block, counts = _encode(encoder, inputs, tuple(sinks))
            mask = inputs.get("pixel_attention_mask")
            width = int(counts.max()) if mask is None else mask.shape[1]
            for block, features in by_block.items():
                values = _mean(features, counts) if kind == "mean" else _padded(features, counts, width)
                with np.errstate(over="ignore"):
                    stored = values.cpu().numpy().astype(STORED[settings.stored])
                if not np.isfinite(stored).all():
                    raise HiveError(
                        f"features of {encoder.info.name}, block {block}: not finite as {settings.stored}; expected"
                        " sound weights, and fp32 where fp16 is too small"
                    )
                sinks[block].append(stored, counts if kind == "tokens" else None)
            bar.update(size)


def _encode(
    encoder: ProbeEncoder, inputs: Mapping[str, Tensor], blocks: Sequence[int]
) -> tuple[dict[int, Tensor], np.ndarray]:
    """(all patches end to end, D) float32 by block, and the patches of each image."""
    tower = encoder.tower
    on_device = {
        name: value.to(tower.device, tower.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    features = encode_images(tower, blocks, **on_device)
    counts = np.array([rows * columns for rows, columns in features.grids])
    return {block: values.float() for block, values in features.by_block.items()}, counts


def _mean(features: Tensor, counts: np.ndarray) -> Tensor:
    return torch.stack([image.mean(0) for image in features.split(counts.tolist())])


def _padded(features: Tensor, counts: np.ndarray, width: int) -> Tensor:
    """(I, width, D), the end of smaller images zero."""
    padded = features.new_zeros(len(counts), width, features.shape[-1])
    for image, values in zip(padded, features.split(counts.tolist()), strict=True):
        image[: len(values)] = values
    return padded


class _Processed(Dataset):
    """Images by number, decoded and preprocessed; one that fails is returned as its error, to be raised outside."""

    def __init__(self, images: LabelledImages, preprocess: Preprocessor) -> None:
        self._images, self._preprocess = images, preprocess

    def __len__(self) -> int:
        return self._images.size

    def __getitem__(self, index: int) -> dict[str, Tensor] | HiveError:
        try:
            return self._preprocess([decode_image(self._images.read(index))])
        except (HiveError, OSError) as error:
            return HiveError(f"{self._images.describe(index)}: {error}")


def _batches(
    images: LabelledImages, preprocess: Preprocessor, settings: ExtractSettings
) -> Iterator[dict[str, Tensor]]:
    loader: DataLoader = DataLoader(
        _Processed(images, preprocess),
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        multiprocessing_context="fork" if settings.workers else None,  # as Python 3.14 does not of itself: seconds each
        collate_fn=list,
    )
    for items in loader:
        for item in items:
            if isinstance(item, HiveError):
                raise item
        shapes = {tuple(item["pixel_values"].shape) for item in items}
        if len(shapes) > 1:
            raise HiveError(f"{images.name}: the image processor returns unequal sizes, {sorted(shapes)}")
        yield {name: torch.cat([item[name] for item in items]) for name in items[0]}
