"""Images: every kind of file, every kind of image processor, and the packed batch."""

from __future__ import annotations

import io
import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from tiny_data import PROCESSORS, make_image_processor, photo, png

from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.batch import BadSample, PreparedSample, collate
from hive_ds.data.images import decode_image, process_images, to_rgb
from hive_ds.data.preprocess import make_preprocessor
from hive_ds.data.text import EncodedSample
from hive_ds.errors import HiveError


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def announced(width: int, height: int) -> bytes:
    """A PNG that announces so many pixels in a few bytes."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff_tags(*tags: tuple[int, int, int]) -> bytes:
    """EXIF of ``(tag, type, value)``, each one number."""
    packed = b"".join(struct.pack("<HHIi", tag, kind, 1, value) for tag, kind, value in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + packed + bytes(4)


ARROW = Image.fromarray(np.kron(np.array([[255, 0], [255, 255]], np.uint8), np.ones((8, 8), np.uint8)))


def test_exif_turns_the_image_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decode_image(encode(ARROW, "PNG", exif=exif))
    assert np.array_equal(np.asarray(turned)[..., 0], np.rot90(np.asarray(ARROW), -1))


def test_every_orientation_beside_a_tag_that_pillow_cannot_write_again() -> None:
    """As Pillow turns the picture without that tag, and once only."""
    for orientation in range(1, 9):
        clean = encode(ARROW, "PNG", exif=tiff_tags((0x0112, 3, orientation)))
        odd = encode(ARROW, "PNG", exif=tiff_tags((0x0101, 9, -5), (0x0112, 3, orientation)))
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(clean))).convert("RGB")
        turned = decode_image(odd)
        assert np.array_equal(turned, expected), orientation
        assert np.array_equal(to_rgb(turned), expected), orientation


@pytest.mark.parametrize("largest", [65535, 300, 200])
@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.int32)], ids=["I;16", "I"])
def test_sixteen_bits_are_scaled_by_one_rule(kind: str, dtype: type, largest: int) -> None:
    """Whatever the brightest pixel of the picture is."""
    grey = np.linspace(0, largest, 64).astype(dtype).reshape(8, 8)
    decoded = np.asarray(decode_image(encode(Image.fromarray(grey), kind)))
    assert np.array_equal(decoded, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_longest_strip_is_read() -> None:
    assert decode_image(encode(Image.new("L", (400, 4)), "PNG")).size == (400, 4)


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 8, 4))
    decoded = decode_image(encode(image, "PNG"))
    assert decoded.getpixel((0, 7)) == (255, 255, 255)
    assert decoded.getpixel((0, 0)) == (0, 0, 255)
    palette = decode_image(encode(image.quantize(4), "PNG"))
    assert palette.getpixel((0, 7)) == (255, 255, 255)
    turned = decode_image(encode(image.quantize(4), "PNG", exif=tiff_tags((0x0112, 3, 3))))
    assert [turned.getpixel(place) for place in ((7, 0), (7, 7))] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (9, 8), "white").convert(mode)
    # Pillow 12.3 does not read back its own uncompressed YCbCr files; 13.0 does.
    file = encode(image, "TIFF", compression="tiff_lzw") if mode in ("CMYK", "YCbCr") else encode(image, "PNG")
    decoded = decode_image(file)
    assert (decoded.mode, decoded.size) == ("RGB", (9, 8))
    assert np.asarray(decoded).min() >= 254


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"not an image", "cannot be read"),
        (encode(photo(), "JPEG")[:-200], "cannot be read"),
        (png(size=(1, 1)), "1 x 1 pixels"),
        (announced(10_000, 9_000), "10000 x 9000 pixels"),
        (announced(8_000, 40), "8000 x 40 pixels: one side is 200 times the other, expected at most 100 times"),
        (announced(4, 2_000_000), "4 x 2000000 pixels: expected at most 16384 a side"),
        (announced(60_000, 1_000), "60000 x 1000 pixels: expected at most 16384 a side"),
        (encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "floats"),
        (encode(Image.fromarray(np.full((8, 8), 70_000, np.int32)), "TIFF"), "levels 70000 to 70000: expected 0 to"),
        (encode(Image.fromarray(np.full((8, 8), -1, np.int32)), "TIFF"), "levels -1 to -1: expected 0 to 65535"),
    ],
    ids=[
        "empty",
        "text",
        "truncated",
        "1x1",
        "bomb",
        "strip",
        "long strip",
        "long side",
        "floats",
        "32 bits",
        "signed",
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_file_is_one_clear_error(data: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does for the whole process
    with pytest.raises(HiveError, match=message) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "not ours to change for others"


def test_error_without_a_word_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Pillow's reader of icons with a palette, for one."""
    monkeypatch.setattr(Image.Image, "getexif", Mock(side_effect=AssertionError))
    with pytest.raises(HiveError, match=r"cannot be read: AssertionError$"):
        decode_image(png())


@pytest.mark.parametrize("kind", PROCESSORS)
def test_processors_give_tensors_with_images_in_front(kind: str) -> None:
    processor = make_image_processor(kind)
    images = [photo(1), photo(2, (40, 16)), photo(3, (16, 16))]
    together = process_images(images, processor)
    expected = {"naflex": {"pixel_values": (3, 16, 48), "pixel_attention_mask": (3, 16), "spatial_shapes": (3, 2)}}
    shapes = {name: tuple(value.shape) for name, value in together.items()}
    assert shapes == expected.get(kind, {"pixel_values": (3, 3, 16, 16)})
    for index, image in enumerate(images):
        alone = process_images([image], processor)
        assert all(torch.equal(together[name][index], alone[name][0]) for name in together)


class Tiling:
    def __call__(self, images: list[Image.Image], *, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(2 * len(images), 3, 4, 4)}


def test_tiling_processor_is_refused() -> None:
    with pytest.raises(HiveError, match="Tiling: pixel_values has 4 entries for 2 images"):
        process_images([photo(1), photo(2)], Tiling())


def prepared(name: str, length: int, offsets: list[int], values: list[int]) -> PreparedSample:
    ids = list(range(1, length + 1))
    images = {"pixel_values": torch.tensor(values, dtype=torch.float32).view(-1, 1)} if values else {}
    return PreparedSample(name, EncodedSample(ids, [IGNORE_INDEX, *ids[1:]], offsets, cut=name == "b"), images)


DUMMY = {"pixel_values": torch.zeros(1, 1)}


def test_batch_is_packed_shorter_texts_first_with_images_by_sample_offset_and_listing() -> None:
    samples = [
        prepared("a", 3, [2, 0, 2], [10, 11, 12]),
        prepared("b", 2, [], []),
        PreparedSample(**{**vars(prepared("c", 4, [1], [20])), "bad": (BadSample("x", "why"),)}),
    ]
    batch = collate(samples, DUMMY)
    assert batch.input_ids.tolist() == [1, 2, 1, 2, 3, 1, 2, 3, 4]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [-100, 2, -100, 2, 3, -100, 2, 3, 4]
    assert batch.sample_ids == ["b", "a", "c"]
    assert batch.text_lengths == [2, 3, 4]
    assert batch.image_offsets == [[], [0, 2, 2], [1]]
    assert batch.images["pixel_values"].flatten().tolist() == [11, 10, 12, 20]
    assert (batch.num_samples, batch.num_images, batch.supervised_tokens, batch.num_cut) == (3, 4, 6, 1)
    assert batch.bad == (BadSample("x", "why"),)


def test_batch_without_images_carries_one_black_image_that_no_token_sees() -> None:
    processor = make_image_processor("siglip")
    preprocess = make_preprocessor(processor)
    samples = [prepared("a", 3, [], []), prepared("b", 2, [], [])]
    batch = collate(samples, preprocess.dummy(), preprocess.normalise)
    assert batch.image_offsets == [[2], []]
    assert batch.num_images == 0
    black = process_images([Image.new("RGB", (16, 16))], processor)["pixel_values"]
    assert torch.equal(batch.model_inputs("cpu", torch.float32)["pixel_values"], black)


def test_model_inputs_cast_pixels_alone() -> None:
    samples = [prepared("a", 2, [0], [3])]
    samples[0].images["spatial_shapes"] = torch.tensor([[1, 1]])  # type: ignore[index]
    inputs = collate(samples, DUMMY).model_inputs("cpu", torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["spatial_shapes"].dtype == inputs["input_ids"].dtype == inputs["labels"].dtype == torch.int64
    assert inputs["image_offsets"] == [[0]]
    assert inputs["text_lengths"] == [2]
