"""Images: encoded bytes -> RGB -> the tensors of a Hugging Face image processor."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from hive_ds.errors import HiveError, told_as

MIN_SIDE = 4
"""Pixels. Smaller images carry nothing, and sides of 1 or 3 make image processors mistake a side for the channels."""
MAX_PIXELS = 89_478_485
"""Decompression bombs start here: Pillow's own limit (`Image.MAX_IMAGE_PIXELS`), at which it only warns."""
MAX_SIDE = 16_384
"""Pixels. Padded to a square, such an image takes 1 GB of memory. WebP files go just as far."""
MAX_RATIO = 100
"""Longer side to shorter. Where the shorter one is resized, a longer strip becomes many times the usual pixels."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""


class ImageProcessor(Protocol):
    """What is used of a Hugging Face image processor."""

    def __call__(self, images: Any, *, return_tensors: str) -> Any:
        """Turn a list of RGB images into a dict of tensors."""
        ...


def auto_image_processor(where: str | Path) -> Any:
    """transformers' ``AutoImageProcessor.from_pretrained``, of the kind that was saved.

    Version 4 adds a notice of three lines that version 5 will pick another kind, once in each process. HiveError where
    there is none, or it does not load.
    """
    from transformers import AutoImageProcessor

    chooser = logging.getLogger("transformers.models.auto.image_processing_auto")
    chooser.addFilter(_is_no_notice)
    expected = "the folder of a vision encoder, or its name on the hub, which must be reached"
    try:
        with told_as(f"image processor of {where} does not load", expected):
            return AutoImageProcessor.from_pretrained(where)
    finally:
        chooser.removeFilter(_is_no_notice)


def _is_no_notice(record: logging.LogRecord) -> bool:
    return "`use_fast` is unset" not in record.getMessage()


def read_image_file(path: str | Path) -> bytes:
    """Return the bytes of a picture's file; HiveError, naming it, where there is none or it cannot be decoded."""
    try:
        data = Path(path).expanduser().read_bytes()
        decode_image(data)
    except OSError as error:
        raise HiveError(f"image {path}: {error.strerror}") from error
    except HiveError as error:
        raise HiveError(f"image {path}: {error}") from error
    return data


def decode_image(data: bytes) -> Image.Image:
    """Decode one encoded file to an RGB image, turned upright by its EXIF tag; HiveError where it cannot be read."""
    try:
        with _no_truncated_images():
            image = Image.open(io.BytesIO(data))
            _check_size(image)
            image.load()
            return to_rgb(image)
    except HiveError:
        raise
    except UnidentifiedImageError:  # its own message holds an address, another one each time
        raise HiveError(f"image of {len(data)} bytes cannot be read: no known image format") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more on bad files
        reason = str(error) or type(error).__name__
        raise HiveError(f"image of {len(data)} bytes cannot be read: {reason}") from error


@contextlib.contextmanager
def _no_truncated_images() -> Iterator[None]:
    """Have Pillow refuse files that end too early; some libraries switch that off for the whole process on import."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise HiveError(f"image of {width} x {height} pixels: expected at least {MIN_SIDE} a side")
    if width * height > MAX_PIXELS:
        raise HiveError(f"image of {width} x {height} pixels: expected at most {MAX_PIXELS} in all")
    if max(width, height) > MAX_SIDE:
        raise HiveError(f"image of {width} x {height} pixels: expected at most {MAX_SIDE} a side")
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_RATIO:
        raise HiveError(
            f"image of {width} x {height} pixels: one side is {ratio:.4g} times the other, "
            f"expected at most {MAX_RATIO} times"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` upright and in RGB: transparency over white, 16-bit grey scaled to 8 bits.

    HiveError for grey levels that 16 bits do not hold, and for floats.
    """
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:  # not by `ImageOps.exif_transpose`: it writes all other tags again and fails at odd ones
        image = image.transpose(turn)
        image.info = {name: value for name, value in image.info.items() if name == "transparency"}  # no orientation
    if image.mode.startswith("I"):  # I;16; or I, of 32 bits, in which Pillow reads some files of 16
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise HiveError(f"image of grey levels {grey.min()} to {grey.max()}: expected 0 to 65535")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise HiveError("image of 32-bit floats: its range is unknown, expected integers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def process_images(images: Sequence[Image.Image], processor: ImageProcessor) -> dict[str, torch.Tensor]:
    """Run the image processor over RGB ``images``; every tensor has them as its leading dim.

    ``pixel_values`` is (I,3,h,w), or (I,patches,3*p*p) beside ``pixel_attention_mask`` and ``spatial_shapes`` for
    processors of native aspect ratio. HiveError where the processor returns another number of images.
    """
    outputs = processor(images=list(images), return_tensors="pt")
    tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    for name, value in tensors.items():
        if len(value) != len(images):
            raise HiveError(
                f"image processor {type(processor).__name__}: {name} has {len(value)} entries for {len(images)} "
                "images; expected one each (no tiling, no frames)"
            )
    if "pixel_values" not in tensors:
        raise HiveError(f"image processor {type(processor).__name__}: returns no pixel_values")
    return tensors
