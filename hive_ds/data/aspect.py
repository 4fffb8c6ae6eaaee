"""What becomes of an image that is no square: as the encoder's own processor has it, or padded to one."""

from __future__ import annotations

from typing import Any

import transformers

from hive_ds.errors import HiveError

PADDING = "LlavaImageProcessor"
"""Class of transformers that pads to a square with its mean colour, then does as CLIP's."""
SHARED = (
    "do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
"""Settings that it has in common with the processors that it can stand in for."""
REPLACED = ("Siglip", "CLIP", "Bit", "Llava")


def with_aspect(processor: Any, aspect: str) -> Any:
    """An image processor that does what ``processor`` does, but for images that are no squares.

    Args:
        processor: of transformers.
        aspect: ``square``, as the processor does by itself, or ``pad``, as `DataConfig.image_aspect` has them.

    Returns:
        The processor itself where nothing is to be changed.

    Raises:
        HiveError: padding, and a processor that `PADDING` cannot stand in for.
    """
    name = type(processor).__name__
    pads = name.startswith(PADDING) and bool(processor.do_pad)
    if pads == (aspect == "pad"):
        return processor
    family, found, variant = name.partition("ImageProcessor")
    if not found or family not in REPLACED:
        known = ", ".join(f"{one}ImageProcessor" for one in REPLACED)
        raise HiveError(f"data.image_aspect is {aspect!r}, but the image processor is {name}; expected one of {known}")
    crops = bool(getattr(processor, "do_center_crop", None))
    return getattr(transformers, PADDING + variant)(
        **{setting: getattr(processor, setting) for setting in SHARED},
        do_pad=not pads,
        do_center_crop=crops,
        **({"crop_size": processor.crop_size} if crops else {}),
    )
