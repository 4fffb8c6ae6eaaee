"""Tiny encoders with processors, and small sets of labelled pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tiny_models import tiny_encoder

from hive_ds.evaluation.probes.data import TASK, LabelledImages
from hive_ds.evaluation.probes.encoder import ProbeEncoder, make_encoder

PROCESSORS = {
    "siglip": transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    "siglip2": transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=15),
    "aimv2": transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "clip": transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "dinov2": transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "dinov3": transformers.DINOv3ViTImageProcessorFast(size={"height": 32, "width": 32}),
    "dinov2_with_registers": transformers.BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ),
}


def encoder(family: str = "siglip", seed: int = 0, **changes: Any) -> ProbeEncoder:
    """A random encoder of 4 blocks on 32-pixel images; ``changes`` go to `make_encoder`."""
    return make_encoder(tiny_encoder(family, seed), PROCESSORS[family], f"{family}-{seed}", device="cpu", **changes)


def save_encoder(folder: Path, seed: int = 0) -> Path:
    """A stock folder with its image processor."""
    tiny_encoder("siglip", seed).save_pretrained(folder)
    PROCESSORS["siglip"].save_pretrained(folder)
    return folder


def noise_png(seed: int, size: tuple[int, int] = (40, 33), shift: int = 0) -> bytes:
    """A picture of noise, ``shift`` brighter in red."""
    pixels = np.random.default_rng(seed).integers(0, 156, (*size, 3))
    pixels[..., 0] += shift
    return png(pixels)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def labelled(name: str, size: int, first: int = 0, classes: Sequence[str] = ("a", "b")) -> LabelledImages:
    """Noise of unequal sizes, the classes in turn, told apart by their red."""
    files = [noise_png(first + n, (33 + n % 9, 40), shift=60 * (n % len(classes))) for n in range(size)]
    return LabelledImages.from_files(name, files, {TASK: [classes[n % len(classes)] for n in range(size)]})
