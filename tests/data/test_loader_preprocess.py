"""Image processors computed directly equal the Hugging Face ones; what is unusual is left to them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import skimage
import torch
import transformers
from PIL import Image
from tiny_data import PROCESSORS, make_image_processor, photo

from hive_ds.data.images import process_images
from hive_ds.data.mds import write_mds
from hive_ds.data.preprocess import KNOWN, make_preprocessor
from hive_ds.data.schema import Sample, Turn, caption_sample
from hive_ds.data.speed import measure_speed
from hive_ds.errors import HiveError

SIZES = ((32, 32), (33, 47), (64, 31), (7, 5), (201, 90), (4, 61), (30, 30))


def smooth(seed: int, size: tuple[int, int]) -> Image.Image:
    """Blurred noise with some grain, as photographs have."""
    coarse = photo(seed, (size[0] // 8 + 2, size[1] // 8 + 2)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(coarse, photo(seed, size), 0.1)


def make(name: str, **changes: object) -> transformers.BaseImageProcessor:
    square = {"height": 30, "width": 30}
    sizes = {"size": square} if name.startswith("Siglip") else {"size": {"shortest_edge": 33}, "crop_size": square}
    return getattr(transformers, name)(**{**sizes, **changes})


def photographs() -> list[Image.Image]:
    """Real ones, of up to 600 x 400 pixels."""
    folder = Path(skimage.__file__).parent / "data"
    return [Image.open(folder / name).convert("RGB") for name in ("astronaut.png", "coffee.png", "camera.png")]


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("name", KNOWN)
def test_direct_values_are_the_processors(name: str, resample: int) -> None:
    processor = make(name, resample=resample)
    preprocess = make_preprocessor(processor)
    assert preprocess.plan is not None
    for images in ([smooth(1, size) for size in SIZES], [photo(2, size) for size in SIZES], photographs()):
        ours, expected = preprocess(images), process_images(images, processor)
        assert ours.keys() == expected.keys() == {"pixel_values"}
        assert ours["pixel_values"].shape == expected["pixel_values"].shape
        assert ours["pixel_values"].is_contiguous()
        assert ours["pixel_values"].dtype == expected["pixel_values"].dtype
        levels = preprocess.levels(images)["pixel_values"]
        assert levels.dtype == torch.uint8
        assert preprocess.normalise(levels).equal(ours["pixel_values"])
        std = torch.tensor(processor.image_std).view(3, 1, 1)
        assert float(((ours["pixel_values"] - expected["pixel_values"]).abs() * std).max()) < 1e-5  # 1/255 is 4e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("CLIPImageProcessor", {"crop_size": {"height": 40, "width": 30}}),  # pads
        ("CLIPImageProcessorFast", {"do_normalize": False}),
        ("CLIPImageProcessor", {"do_resize": False}),
        ("SiglipImageProcessor", {"resample": 1}),
        ("SiglipImageProcessorFast", {"do_pad": True, "pad_size": {"height": 40, "width": 40}}),
        ("BitImageProcessorFast", {"size": {"shortest_edge": 20, "longest_edge": 25}}),
        ("ViTImageProcessor", {}),
    ],
)
def test_what_is_unusual_is_left_to_the_processor(name: str, changes: dict[str, object]) -> None:
    processor = make(name, **changes)
    preprocess = make_preprocessor(processor)
    assert preprocess.plan is None


def test_processor_that_does_not_do_what_it_says_is_left_alone() -> None:
    """The subclass stands in for a class that a later version of transformers changes."""
    processor = make("SiglipImageProcessor")
    odd = type("SiglipImageProcessor", (type(processor),), {"__module__": "transformers.odd"})
    odd.normalize = lambda self, image, *_, **__: -image
    assert make_preprocessor(odd(size={"height": 30, "width": 30})).plan is None
    same = type("SiglipImageProcessor", (type(processor),), {"__module__": "transformers.same"})
    assert make_preprocessor(same(size={"height": 30, "width": 30})).plan is not None
    other = type("SiglipImageProcessor", (type(processor),), {"__module__": "my_transformers.same"})
    assert make_preprocessor(other(size={"height": 30, "width": 30})).plan is None, "it may do anything elsewhere"


def test_processors_of_the_supported_encoders() -> None:
    direct = [make_preprocessor(make_image_processor(kind)).plan is not None for kind in PROCESSORS]
    assert direct == [True, True, True, False]


def test_speed_is_measured_on_a_folders_images(tmp_path: Path) -> None:
    def jpeg(seed: int) -> bytes:
        out = io.BytesIO()
        smooth(seed, (200, 100)).save(out, "JPEG")
        return out.getvalue()

    write_mds([caption_sample(str(index), jpeg(index), "a") for index in range(3)], tmp_path / "data")
    report = measure_speed(tmp_path / "data", make("SiglipImageProcessor"), seconds=0.05)
    assert (report.num_images, report.megapixels, report.direct) == (3, 0.02, True)
    assert report.decode > report.prepared > 0 < report.plain < report.decode
    assert f"{report.prepared:.1f}" in str(report)
    assert len(str(report).splitlines()) == 4
    write_mds([Sample("a", (Turn("user", "b"), Turn("assistant", "c")))], tmp_path / "text")
    with pytest.raises(HiveError, match="holds no images to time"):
        measure_speed(tmp_path / "text", make("SiglipImageProcessor"))
