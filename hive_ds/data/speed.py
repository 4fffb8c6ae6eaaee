"""How fast images are decoded and preprocessed on one core: ours beside a plain loop."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from hive_ds.data.images import ImageProcessor, decode_image, process_images
from hive_ds.data.preprocess import make_preprocessor
from hive_ds.errors import HiveError

NUM_IMAGES = 64
"""Images that are read for the measurement, the first of the folder."""


@dataclass(frozen=True)
class SpeedReport:
    """Images per second on one core; ``direct`` tells whether the image processor is one that is computed directly."""

    num_images: int
    megapixels: float
    """Mean size of an image."""
    direct: bool
    decode: float
    """Decoding alone."""
    prepared: float
    """Decoding and preprocessing, as the loader does it."""
    plain: float
    """Pillow and the Hugging Face image processor, one image at a time."""

    def __str__(self) -> str:
        how = "computed directly" if self.direct else "the Hugging Face image processor itself"
        rows = {
            "decode": self.decode,
            f"decode + preprocess ({how})": self.prepared,
            "plain Pillow + Hugging Face image processor": self.plain,
        }
        head = f"{self.num_images} images of {self.megapixels:.2g} megapixels on one core, images/s\n"
        return head + "\n".join(f"  {name:<64}{rate:8.1f}" for name, rate in rows.items())


def measure_speed(folder: str | Path, image_processor: ImageProcessor, seconds: float = 3.0) -> SpeedReport:
    """Time the first `NUM_IMAGES` images of an MDS ``folder`` for about ``seconds`` each way, on one thread.

    HiveError where the folder has no images, cannot be read, or holds one that cannot be decoded.
    """
    files = _first_images(folder)
    sizes = [decode_image(file).size for file in files]
    preprocess = make_preprocessor(image_processor)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return SpeedReport(
            num_images=len(files),
            megapixels=sum(width * height for width, height in sizes) / len(sizes) / 1e6,
            direct=preprocess.plan is not None,
            decode=_rate(decode_image, files, seconds),
            prepared=_rate(lambda file: preprocess([decode_image(file)]), files, seconds),
            plain=_rate(
                lambda file: process_images([Image.open(io.BytesIO(file)).convert("RGB")], image_processor),
                files,
                seconds,
            ),
        )
    finally:
        torch.set_num_threads(threads)


def _first_images(folder: str | Path) -> list[bytes]:
    from hive_ds.data.mds.reading import open_folder

    files: list[bytes] = []
    for sample in open_folder(folder):
        files += sample.images
        if len(files) >= NUM_IMAGES:
            break
    if not files:
        raise HiveError(f"data folder {folder}: holds no images to time")
    return files[:NUM_IMAGES]


def _rate(work: Callable[[bytes], object], files: list[bytes], seconds: float) -> float:
    """Calls per second, over whole rounds through ``files`` after one image to warm up."""
    work(files[0])
    start, done = time.perf_counter(), 0
    while not done or time.perf_counter() - start < seconds:
        for file in files:
            work(file)
        done += len(files)
    return done / (time.perf_counter() - start)
