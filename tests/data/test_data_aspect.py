"""Padding to a square: as it is defined, under every encoder's processor, by transformers and computed directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_data import make_image_processor, photo

from hive_ds.data.aspect import with_aspect
from hive_ds.data.images import process_images
from hive_ds.data.preprocess import make_preprocessor
from hive_ds.errors import HiveError

SIZES = ((24, 20), (9, 31), (16, 16))


def padded_by_hand(image: Image.Image, mean: list[float]) -> Image.Image:
    side = max(image.size)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = [int(255 * channel) for channel in mean]
    top, left = (side - image.height) // 2, (side - image.width) // 2
    canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(canvas)


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2"])
def test_padding_is_what_it_says(kind: str) -> None:
    plain = make_image_processor(kind)
    padding = with_aspect(plain, "pad")
    images = [photo(seed, size) for seed, size in enumerate(SIZES)]
    expected = process_images([padded_by_hand(image, plain.image_mean) for image in images], plain)["pixel_values"]
    found = process_images(images, padding)["pixel_values"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    direct = make_preprocessor(padding)
    assert direct.plan is not None, "not computed directly"
    torch.testing.assert_close(direct(images)["pixel_values"], expected, rtol=0, atol=1e-3)
    back = process_images(images, with_aspect(padding, "square"))["pixel_values"]
    torch.testing.assert_close(back, process_images(images, plain)["pixel_values"], rtol=0, atol=1e-5)
    again = process_images(images, with_aspect(with_aspect(padding, "square"), "pad"))["pixel_values"]
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    assert with_aspect(padding, "pad") is padding
    assert with_aspect(plain, "square") is plain


def test_padding_keeps_the_kind_of_resize() -> None:
    """Pillow's and torchvision's differ by up to two levels; transformers 4 and 5 name them differently."""
    names = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
    kinds = {getattr(transformers, name) for name in names if hasattr(transformers, name)}
    assert len(kinds) == 2
    for kind in kinds:
        assert type(with_aspect(kind(), "pad")).__name__ == kind.__name__.replace("CLIP", "Llava")


def test_a_processor_that_keeps_the_aspect_is_refused() -> None:
    with pytest.raises(HiveError, match="image_aspect is 'pad', but the image processor is Siglip2ImageProcessor"):
        with_aspect(make_image_processor("naflex"), "pad")
