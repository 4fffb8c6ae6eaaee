"""What a conversion does to images: decode every one, and store it smaller where asked."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field

from PIL import Image

from hive_ds.data.images import decode_image
from hive_ds.errors import HiveError, require_one_of

IMAGE_FORMATS = ("jpeg", "webp", "png")


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored.

    Attributes:
        resize: images whose shorter side has more pixels are shrunk to it; None leaves sizes alone.
        format: "jpeg", "webp" or "png" (the file's own bytes stay where they are fewer); None keeps each file as it is,
            and resized ones become JPEG.
        quality: of JPEG and WebP, 1 to 100.
    """

    resize: int | None = None
    format: str | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        if self.format is not None:
            require_one_of("image format", self.format, IMAGE_FORMATS)
        if self.resize is not None and self.resize < 16:
            raise HiveError(f"resize to {self.resize} pixels: expected 16 or more")
        if not 1 <= self.quality <= 100:
            raise HiveError(f"image quality {self.quality}: expected 1 to 100")


@dataclass
class ImageStorer:
    """Decodes and stores images, and keeps count of the time it takes."""

    options: ImageOptions
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "encode": 0.0})

    def store(self, data: bytes) -> bytes:
        """The bytes to store for the file ``data``; HiveError where it is no image that can be used."""
        start = time.perf_counter()
        image = decode_image(data)
        decoded = time.perf_counter()
        stored = self._encode(image, data)
        self.seconds["decode"] += decoded - start
        self.seconds["encode"] += time.perf_counter() - decoded
        return stored

    def _encode(self, image: Image.Image, data: bytes) -> bytes:
        limit = self.options.resize
        shrinks = limit is not None and min(image.size) > limit
        if not shrinks and self.options.format is None:
            return data
        if shrinks and limit is not None:
            scale = limit / min(image.size)
            width, height = (max(limit, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        form = self.options.format or "jpeg"
        options = {} if form == "png" else {"quality": self.options.quality}
        image.save(buffer, form, **options)
        encoded = buffer.getvalue()
        return encoded if shrinks or len(encoded) < len(data) else data
