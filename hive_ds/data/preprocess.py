"""The usual image processors, computed without their detours; every other one as it is.

SigLIP's, CLIP's, DINOv2's (BitImageProcessor) and LLaVA's all pad to a square (LLaVA's alone), resize, crop the centre
(but SigLIP's), and shift and scale each channel. Done directly, arrays are not copied and converted at every turn. The
resize is the class's own, Pillow's or torchvision's: the two differ by up to two of 255 levels. What a processor does
here is compared with what it does itself on two images before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from hive_ds.data.batch import Normalisation
from hive_ds.data.images import ImageProcessor, process_images

KNOWN = tuple(f"{name}ImageProcessor{kind}" for name in ("Siglip", "CLIP", "Bit", "Llava") for kind in ("", "Fast"))
"""Classes of transformers that are computed here; a subclass may do anything, so it is not among them."""
INTERPOLATIONS = {
    Image.Resampling.BILINEAR: functional.InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: functional.InterpolationMode.BICUBIC,
}
PROBES = ((37, 53), (91, 40))
"""Width and height of the images on which a processor is tried."""
TOLERANCE = 0.01
"""Largest difference on them, in levels of 255: rounding of float32 alone."""


@dataclass(frozen=True)
class Preprocessor:
    """Turns RGB images into the tensors of ``processor``: (I,3,h,w) float32 ``pixel_values``, or what it returns.

    ``plan`` is how to compute them directly; None calls the processor.
    """

    processor: ImageProcessor
    plan: _Plan | None

    @property
    def normalise(self) -> Normalisation | None:
        """What is left to do of `levels`."""
        return None if self.plan is None else self.plan.normalise

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Process ``images``; HiveError as `process_images`."""
        if self.plan is None or not images:
            return process_images(images, self.processor)
        return {"pixel_values": self.plan.normalise(self.levels(images)["pixel_values"])}

    def levels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The same before `normalise`, in uint8 where there is one."""
        if self.plan is None:
            return process_images(images, self.processor)
        return {"pixel_values": torch.stack([self.plan.apply(image) for image in images])}

    def dummy(self) -> dict[str, Tensor]:
        """`levels` of one black image, which a batch without images carries (see `hive_ds.data.batch`)."""
        return self.levels([Image.new("RGB", (64, 64))])


def make_preprocessor(processor: ImageProcessor) -> Preprocessor:
    """The fastest way to compute what ``processor`` does: directly where it is one of `KNOWN` with usual settings."""
    plan = _read_plan(processor)
    # Which resize a class has depends on the version of transformers, so both are tried.
    plans = [] if plan is None else [plan, replace(plan, on_tensors=True)]
    return Preprocessor(processor, next((plan for plan in plans if _is_equal(plan, processor)), None))


@dataclass(frozen=True)
class _Plan:
    """``size`` is (height, width) or the shortest edge.

    ``background`` is the colour around an image that is padded to a square; None: it is not.
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    resample: Image.Resampling
    on_tensors: bool
    normalise: Normalisation
    background: tuple[int, ...] | None = None

    def apply(self, image: Image.Image) -> Tensor:
        """(3,h,w) levels."""
        if self.background is not None:
            image = _squared(image, self.background)
        height, width = self._resized(image)
        if self.on_tensors:
            mode = INTERPOLATIONS[self.resample]
            pixels = functional.resize(functional.pil_to_tensor(image), [height, width], interpolation=mode)
        else:
            resized = image if image.size == (width, height) else image.resize((width, height), self.resample)
            pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            pixels = pixels[:, top : top + self.crop[0], left : left + self.crop[1]]
        return pixels

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        short, long = sorted(image.size)
        long = int(self.size * long / short)
        return (long, self.size) if image.width <= image.height else (self.size, long)


def _squared(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _read_plan(processor: Any) -> _Plan | None:
    """What ``processor``'s attributes say it does; None where that is not what `_Plan` can do."""
    name = type(processor).__name__
    if name not in KNOWN or not type(processor).__module__.startswith("transformers."):
        return None
    needed = (processor.do_resize, processor.do_rescale, processor.do_normalize, processor.resample in INTERPOLATIONS)
    size = _size(processor.size)
    crop = _size(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    if not all(needed) or size is None or isinstance(crop, int):
        return None
    smallest = (size, size) if isinstance(size, int) else size
    if crop is not None and (crop[0] > smallest[0] or crop[1] > smallest[1]):
        return None  # it would pad
    mean, std = (torch.tensor(values) for values in (processor.image_mean, processor.image_std))
    normalise = Normalisation(tuple((processor.rescale_factor / std).tolist()), tuple((-mean / std).tolist()))
    resample = Image.Resampling(processor.resample)
    pads = getattr(processor, "do_pad", None)
    background = tuple(int(255 * channel) for channel in processor.image_mean) if pads else None
    return _Plan(size, crop, resample, False, normalise, background)


def _size(size: Mapping[str, int | None]) -> tuple[int, int] | int | None:
    given = {name: value for name, value in dict(size).items() if value is not None}
    if given.keys() == {"height", "width"}:
        return int(given["height"]), int(given["width"])
    return int(given["shortest_edge"]) if given.keys() == {"shortest_edge"} else None


def _is_equal(plan: _Plan, processor: ImageProcessor) -> bool:
    """Whether ``plan`` does what ``processor`` does, on noise."""
    drawn = np.random.default_rng(0)
    for width, height in PROBES:
        image = Image.fromarray(drawn.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = process_images([image], processor)
        ours = plan.normalise(plan.apply(image)[None])
        if expected.keys() != {"pixel_values"} or expected["pixel_values"].shape != ours.shape:
            return False
        levels = (ours - expected["pixel_values"]).abs() / torch.tensor(plan.normalise.scale).view(-1, 1, 1)
        if bool(levels.max() > TOLERANCE):
            return False
    return True
