"""Options of a conversion: which can be, what they do, and what is said in the end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import encoded, make_source, photo
from PIL import Image

from hive_ds.data.convert import convert
from hive_ds.data.convert_images import ImageOptions, ImageStorer
from hive_ds.data.convert_options import ConversionSummary, ConvertOptions
from hive_ds.errors import HiveError

pytest.importorskip("streaming", reason="needs mosaicml-streaming: pip install 'hive-ds[streaming]'")
from hive_ds.data.mds import read_mds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_seed": -1}, "shuffle_seed is -1; expected at least 0"),
        ({"workers": 0}, "workers is 0; expected at least 1"),
        ({"part_size": 0}, "part_size is 0; expected at least 1"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"max_reject_share": 1.1}, "max_reject_share is 1.1; expected 0 to 1"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HiveError, match=rf"^{message}$"):
        ConvertOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 15}, "resize to 15 pixels: expected 16 or more"),
        ({"format": "gif"}, "image format 'gif': expected one of jpeg, webp, png"),
        ({"quality": 0}, "image quality 0: expected 1 to 100"),
        ({"quality": 101}, "image quality 101: expected 1 to 100"),
    ],
)
def test_image_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HiveError, match=rf"^{message}$"):
        ImageOptions(**options)
    ImageOptions(16, quality=1)


def stored(image: bytes, **options: Any) -> Image.Image | None:
    """What becomes of ``image``; None where its own bytes stay."""
    data = ImageStorer(ImageOptions(**options)).store(image)
    return None if data == image else Image.open(io.BytesIO(data))


def test_images_are_stored_as_options_say() -> None:
    """Shrunk by the shorter side, though the file may grow; otherwise written anew only where that makes it smaller."""
    jpeg, flat = encoded(photo(120, 40), "jpeg"), encoded(Image.new("RGB", (120, 90)), "png")
    assert stored(jpeg, resize=40) is None
    shrunk = stored(flat, resize=45)
    assert shrunk is not None
    assert (shrunk.format, shrunk.size) == ("JPEG", (60, 45))
    assert stored(jpeg, format="png") is None
    assert stored(flat, format="jpeg") is None
    smaller = stored(jpeg, format="jpeg", quality=20)
    assert smaller is not None
    assert (smaller.format, smaller.size) == ("JPEG", (120, 40))
    assert stored(encoded(photo(120, 40), "bmp"), format="png") is not None
    bitmap = encoded(photo(120, 40), "bmp")
    lengths = [len(ImageStorer(ImageOptions(format="jpeg", quality=quality)).store(bitmap)) for quality in (20, 95)]
    assert lengths[0] < lengths[1]


def test_limit_takes_the_first_after_shuffling(tmp_path: Path) -> None:
    options = ConvertOptions(workers=1, part_size=4, shuffle_seed=3, limit=9, max_reject_share=1.0)
    convert(make_source(tmp_path), tmp_path / "out", options)
    expected = [str(number) for number in np.random.default_rng(3).permutation(60)[:9] if number != 7]
    assert [sample.id for sample in read_mds(tmp_path / "out")] == expected


def test_summary_says_what_came_of_it() -> None:
    assert str(ConversionSummary(2, 1, 0, 0, 0)) == (
        "2 samples, 0 images (0.0 MB); 1 rejected, listed in rejects.jsonl; warning: no sample has an image"
    )
    assert str(ConversionSummary(2, 0, 2, 1_500_000, 6_000_000, {"decode": 0.26, "encode": 0.0})) == (
        "2 samples, 2 images (1.5 MB, 75% less than the source's); 0 rejected; decode took 0.3 s"
    )
