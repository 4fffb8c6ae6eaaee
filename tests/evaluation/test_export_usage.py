"""The lines under "Use" of an exported folder's card take the features that training saw of the same picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from export_models import PROCESSORS, save_hive
from PIL import Image
from tiny_models import IMAGE_SIZE

from hive_ds.data.aspect import with_aspect
from hive_ds.export import export_encoder
from hive_ds.export.open_clip_format import _preprocessing
from hive_ds.export.transformers_format import patch_tokens
from hive_ds.model.vision import encode_images

LAST_ROUTED = 3
TINY = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 1.5}


def tiny_siglip_of_timm() -> None:
    """open_clip builds SigLIP by names of timm's."""
    timm = pytest.importorskip("timm", reason="timm is not installed; pip install 'hive-ds[timm]'")

    def vit_usage_patch8_siglip_32(pretrained: bool = False, **arguments):
        return timm.models.vision_transformer.vit_base_patch16_siglip_224(pretrained, **{**TINY, **arguments})

    vit_usage_patch8_siglip_32.__module__ = "timm.models.vision_transformer"
    timm.models.register_model(vit_usage_patch8_siglip_32)


def of_pillow(processor: Any) -> Any:
    """The processor that resizes with Pillow, as timm and open_clip do; the usual one of transformers 5 does not."""
    kind = getattr(transformers, f"{type(processor).__name__}Pil", None)
    return processor if kind is None else kind.from_dict(processor.to_dict())


@pytest.mark.parametrize(
    ("format", "family", "tail"),
    [
        *(("transformers", family, "keep") for family in PROCESSORS),
        ("transformers", "siglip", "cut"),
        *(("timm", family, "keep") for family in ("siglip", "clip", "dinov2", "dinov2_with_registers")),
        ("timm", "clip", "cut"),
        ("open_clip", "siglip", "keep"),
        ("open_clip", "clip", "keep"),
        ("open_clip", "clip", "cut"),
    ],
)
def test_the_cards_lines_take_what_training_saw(format, family, tail, tmp_path, monkeypatch) -> None:
    if format != "transformers":
        pytest.importorskip(format, reason=f"{format} is not installed; pip install 'hive-ds[{format}]'")
    if (format, family) == ("open_clip", "siglip"):
        tiny_siglip_of_timm()
    model = save_hive(tmp_path / "model", family)
    export_encoder(tmp_path / "model", tmp_path / "out", format=format, tail=tail)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("in training a picture's shorter side became 40" in card.lower()) == (
        (format, family) == ("open_clip", "clip")
    )
    code = card.partition("## Use\n\n```python\n")[2].partition("```")[0]
    # A square as large as CLIP's crop: resized or cropped, open_clip's pixels are then those of training.
    side = 2 * IMAGE_SIZE
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "picture.jpg", quality=100)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)

    processor = PROCESSORS[family] if format == "transformers" else of_pillow(PROCESSORS[family])
    if (format, family) == ("open_clip", "clip"):
        processor = type(processor)(size={"shortest_edge": IMAGE_SIZE}, crop_size=processor.crop_size)
    inputs = dict(processor(Image.open("picture.jpg").convert("RGB"), return_tensors="pt"))
    with torch.no_grad():
        expected = encode_images(model.vision_encoder, (LAST_ROUTED,), **inputs).by_block[LAST_ROUTED]
    found = names["features"]
    if format == "transformers" and family != "siglip2":  # whose padding the lines themselves leave out
        found = patch_tokens(found, len(expected), None)
    torch.testing.assert_close(found.reshape(expected.shape), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers"])
def test_timm_takes_what_training_saw_at_another_size_than_the_encoders_own(family, tmp_path) -> None:
    """As stock DINOv2: position embeddings for 518 pixels, an image processor that gives 224."""
    timm = pytest.importorskip("timm", reason="timm is not installed; pip install 'hive-ds[timm]'")
    model = save_hive(tmp_path / "model", family, image_size=2 * IMAGE_SIZE)
    export_encoder(tmp_path / "model", tmp_path / "out", format="timm")
    exported = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(exported), is_training=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    inputs = dict(PROCESSORS[family](picture, return_tensors="pt"))
    with torch.no_grad():
        expected = encode_images(model.vision_encoder, (LAST_ROUTED,), **inputs).by_block[LAST_ROUTED]
        (found,) = exported.forward_intermediates(
            preprocess(picture)[None], indices=[LAST_ROUTED - 1], output_fmt="NLC", intermediates_only=True
        )
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "aspect"), [("siglip", "square"), ("siglip", "pad"), ("clip", "pad")])
@pytest.mark.parametrize("size", [(96, 48), (40, 100)])
def test_open_clip_sees_the_pictures_that_the_image_processor_makes(family, aspect, size) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed; pip install 'hive-ds[open_clip]'")
    processor = PROCESSORS[family]
    if family == "clip":
        processor = type(processor)(size={"shortest_edge": IMAGE_SIZE}, crop_size=processor.crop_size)
    processor = with_aspect(processor, aspect)
    ramp = torch.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0], 1).expand(-1, -1, 3)
    picture = Image.fromarray(ramp.to(torch.uint8).numpy())
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    preprocess = open_clip.image_transform(is_train=False, **_preprocessing(processor, IMAGE_SIZE))
    # Padded after the resize, not before: edges differ a little.
    assert (preprocess(picture) - expected).abs().mean() < 0.05
