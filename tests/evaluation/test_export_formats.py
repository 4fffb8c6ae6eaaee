"""Encoders under the names of timm and open_clip: they load strictly, and features are equal to 1e-5 in fp32."""

from __future__ import annotations

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from export_models import PROCESSORS, save_hive
from PIL import Image
from safetensors.torch import load_file
from tiny_models import IMAGE_SIZE, random_images
from transformers import CLIPImageProcessor, SiglipVisionConfig

from hive_ds.data.aspect import with_aspect
from hive_ds.errors import HiveError
from hive_ds.export import export_encoder, open_clip_format, timm_format
from hive_ds.export.formats import foreign_features, mlp_ratio
from hive_ds.export.names import TIMM_SIGLIP
from hive_ds.export.timm_format import _preprocessing
from hive_ds.model.vision import encode_images

timm = pytest.importorskip("timm", reason="timm is not installed; pip install 'hive-ds[timm]'")

TINY = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 1.5}


@timm.models.register_model
def vit_testing_patch8_siglip_32(pretrained: bool = False, **arguments):
    """A tiny SigLIP that timm knows by name, with timm's usual activation, which is not SigLIP's."""
    return timm.models.vision_transformer.vit_base_patch16_siglip_224(pretrained, **{**TINY, **arguments})


@torch.no_grad()
def assert_equal_features(model, intermediates: list[torch.Tensor], pooled: torch.Tensor, images, blocks) -> None:
    expected = encode_images(model.vision_encoder, blocks, images).by_block
    for block, found in zip(blocks, intermediates, strict=True):
        torch.testing.assert_close(found.flatten(0, 1), expected[block], atol=1e-5, rtol=0)
    if pooled is not None:
        torch.testing.assert_close(pooled, model.vision_encoder(images).pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("width", "inner"), [(1152, 4304), (704, 784), (448, 976)])
def test_no_ratio_misses_the_width_of_an_mlp(width: int, inner: int) -> None:
    """Both libraries cut the product to an integer, which 784 / 704 * 704 would be one short of."""
    config = SiglipVisionConfig(hidden_size=width, intermediate_size=inner)
    assert int(width * mlp_ratio(config)) == inner


@pytest.mark.parametrize("resample", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_both_libraries_resize_as_the_image_processor(resample: str) -> None:
    """Or open_clip, which resizes in two ways alone, is no format of it."""
    number = Image.Resampling[resample.upper()]
    processor = CLIPImageProcessor(resample=number)
    found = timm_format._preprocessing(processor, 224)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=found))
    assert transform.transforms[0].interpolation.value == resample
    if resample in ("bilinear", "bicubic"):
        assert open_clip_format._preprocessing(processor, 224)["interpolation"] == resample
        return
    with pytest.raises(HiveError, match=f"resample {int(number)} of the image processor: expected 2 .bilinear. or 3 "):
        open_clip_format._preprocessing(processor, 224)


def test_a_card_counts_blocks_from_zero_and_says_so() -> None:
    lines = foreign_features("visual", 3)
    assert "from 0 here: 2 is block 3, the last one that the LLM saw" in lines
    assert "indices=[2]" in lines


@pytest.mark.parametrize("tail", ["keep", "cut"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("siglip", {"intermediate_size": 43}),
        ("clip", {"hidden_act": "quick_gelu"}),
        ("clip", {"hidden_act": "gelu"}),
        ("dinov2", {}),
        ("dinov2", {"use_swiglu_ffn": True}),
        ("dinov2_with_registers", {}),
    ],
)
def test_timm_makes_the_encoder_of_the_folder(family: str, changes: dict, tail: str, tmp_path) -> None:
    model = save_hive(tmp_path / "model", family, **changes)
    report = export_encoder(tmp_path / "model", tmp_path / "out", format="timm", tail=tail)
    encoder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    encoder.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    images, blocks = random_images(2), (1, 2, 3, 4) if tail == "keep" else (1, 2, 3)
    assert len(encoder.blocks) == report.num_blocks == len(blocks)
    with torch.no_grad():
        found = encoder.forward_intermediates(
            images, indices=[block - 1 for block in blocks], output_fmt="NLC", intermediates_only=True
        )
        assert_equal_features(model, found, encoder(images) if tail == "keep" else None, images, blocks)
    assert "create_model" in (tmp_path / "out" / "README.md").read_text()


def test_timm_sees_the_pictures_that_the_image_processor_makes(tmp_path) -> None:
    save_hive(tmp_path / "model", "clip")
    export_encoder(tmp_path / "model", tmp_path / "out", format="timm")
    config = timm.data.resolve_data_config({}, model=timm.create_model(f"local-dir:{tmp_path / 'out'}"))
    assert config["crop_pct"] == IMAGE_SIZE / 40
    assert config["crop_mode"] == "center"

    pixels = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    expected = PROCESSORS["clip"](picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(timm.data.create_transform(**config)(picture), expected, atol=1e-5, rtol=0)


def test_timm_resizes_to_every_size_that_an_image_processor_may_have() -> None:
    """It divides by the share of the crop and cuts to an integer: 354 to 224 would become 353."""
    sizes = range(224, 448)
    crop = {"height": 224, "width": 224}
    processors = [CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop) for size in sizes]
    shares = [_preprocessing(processor, 224)["crop_pct"] for processor in processors]
    assert [math.floor(224 / share) for share in shares] == list(sizes)
    assert shares[256 - 224] == 0.875


@pytest.mark.parametrize("family", ["siglip", "clip"])
@pytest.mark.parametrize("size", [(96, 48), (40, 100)])
def test_timm_pads_as_an_encoder_trained_on_padded_pictures_needs(family: str, size: tuple[int, int]) -> None:
    processor = with_aspect(PROCESSORS[family], "pad")
    config = timm.data.resolve_data_config({}, pretrained_cfg=_preprocessing(processor, IMAGE_SIZE))
    ramp = torch.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0], 1).expand(-1, -1, 3)
    picture = Image.fromarray(ramp.to(torch.uint8).numpy())
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    found = timm.data.create_transform(**config)(picture)
    assert (found - expected).abs().mean() < 0.03  # padded after the resize, not before: edges differ a little


def test_timm_names_its_own_model_of_these_sizes_and_the_activation_it_needs(tmp_path) -> None:
    model = save_hive(tmp_path / "model")
    report = export_encoder(tmp_path / "model", tmp_path / "out", format="timm")
    assert report.model_class == "timm vit_testing_patch8_siglip_32"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: timm\n" in card
    call = 'timm.create_model("vit_testing_patch8_siglip_32", act_layer="gelu_tanh", num_classes=0)'
    assert call in card
    encoder = eval(call).eval()
    encoder.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    images = random_images(2)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), model.vision_encoder(images).pooler_output, atol=1e-5, rtol=0)


def test_of_timms_models_of_these_sizes_the_one_with_our_activation_is_named() -> None:
    """Another's weights load, too; those of one with other heads would, and mean something else."""
    made = {"vit_exact": {"act_layer": "gelu"}, "vit_tanh": {"act_layer": "gelu_tanh"}}

    def create_model(name: str, **arguments):
        own = {**TINY, **made[name]} if name in made else {}
        return timm.models.vision_transformer.vit_base_patch16_siglip_224(**own, **arguments)

    library = SimpleNamespace(create_model=create_model, list_models=lambda pattern: list(made))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "image_size": IMAGE_SIZE}
    found = [
        timm_format.find_named(library, config, timm_format.timm_arguments(config))
        for heads, act in ((4, "gelu_pytorch_tanh"), (4, "quick_gelu"), (2, "gelu_pytorch_tanh"))
        for config in [
            SiglipVisionConfig(**sizes, patch_size=8, num_attention_heads=heads, hidden_act=act, layer_norm_eps=1e-6)
        ]
    ]
    assert found == ["vit_tanh", "vit_exact", None]


def test_a_dinov2_of_larger_pictures_is_written_for_those_of_training(tmp_path) -> None:
    """Stock DINOv2 has position embeddings of 518 pixels and is trained at 224."""
    model = save_hive(tmp_path / "model", "dinov2", image_size=2 * IMAGE_SIZE)
    export_encoder(tmp_path / "model", tmp_path / "out", format="timm")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"In training pictures came at {IMAGE_SIZE} x {IMAGE_SIZE} pixels" in card
    assert f"resampled from {2 * IMAGE_SIZE} by transformers' rule" in card
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["pos_embed"].shape == (1, 1 + (IMAGE_SIZE // 8) ** 2, 32)
    encoder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images, blocks = random_images(2), (1, 2, 3, 4)
    with torch.no_grad():
        found = encoder.forward_intermediates(
            images, indices=[0, 1, 2, 3], output_fmt="NLC", intermediates_only=True
        )  # fmt: skip
        expected = encode_images(model.vision_encoder, blocks, images).by_block
    for block, features in zip(blocks, found, strict=True):
        torch.testing.assert_close(features.flatten(0, 1), expected[block], atol=1e-5, rtol=0)


def test_every_timm_name_has_one_source(tmp_path) -> None:
    """No two patterns of a table match one name: the order of the table says nothing."""
    model = save_hive(tmp_path / "model")
    names = [name.removeprefix("vision_model.") for name in model.vision_encoder.state_dict()]
    assert all(sum(re.fullmatch(pattern, name) is not None for pattern, _ in TIMM_SIGLIP) == 1 for name in names)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("tail", ["keep", "cut"])
def test_open_clip_loads_a_clip_tower(hidden_act: str, tail: str, tmp_path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed; pip install 'hive-ds[open_clip]'")
    model = save_hive(tmp_path / "model", "clip", hidden_act=hidden_act)
    export_encoder(tmp_path / "model", tmp_path / "out", format="open_clip", tail=tail)
    quick = hidden_act == "quick_gelu"
    blocks = (1, 2, 3, 4) if tail == "keep" else (1, 2, 3)
    vision = open_clip.CLIPVisionCfg(
        layers=len(blocks), width=32, head_width=8, mlp_ratio=1.5, patch_size=8, image_size=IMAGE_SIZE
    )
    text = open_clip.CLIPTextCfg(context_length=4, vocab_size=8, width=64, heads=1, layers=1)
    visual = open_clip.CLIP(24, vision, text, quick_gelu=quick).visual.eval()
    missing = visual.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    assert missing.missing_keys == ["proj"]
    assert missing.unexpected_keys == []
    images = random_images(2)
    with torch.no_grad():
        found = visual.forward_intermediates(
            images, indices=[block - 1 for block in blocks], output_fmt="NLC", intermediates_only=True
        )["image_intermediates"]
    assert_equal_features(model, found, None, images, blocks)


def test_open_clip_is_told_of_another_eps_and_names_by_activation(tmp_path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed; pip install 'hive-ds[open_clip]'")
    for eps, told in ((1e-3, {"eps": 1e-3}), (1e-5, None)):
        save_hive(tmp_path / f"{eps}", "clip", layer_norm_eps=eps)
        export_encoder(tmp_path / f"{eps}", tmp_path / f"out{eps}", format="open_clip")
        config = json.loads((tmp_path / f"out{eps}" / "open_clip_vision.json").read_text())
        assert config["vision_cfg"].get("norm_kwargs") == told
    vision = open_clip.CLIPVisionCfg(layers=12, width=768, head_width=64, mlp_ratio=4.0, patch_size=32, image_size=224)
    names = [open_clip_format._names(open_clip, vision, quick) for quick in (False, True)]
    assert [found[0] for found in names] == ["ViT-B-32", "ViT-B-32-quickgelu"]
    assert not set(names[0]) & set(names[1])


def test_open_clip_loads_a_siglip_tower(tmp_path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed; pip install 'hive-ds[open_clip]'")
    model = save_hive(tmp_path / "model")
    export_encoder(tmp_path / "model", tmp_path / "out", format="open_clip")
    vision = open_clip.CLIPVisionCfg(timm_model_name="vit_testing_patch8_siglip_32", timm_pool="map", timm_proj="none")
    text = open_clip.CLIPTextCfg(context_length=4, vocab_size=8, width=64, heads=1, layers=1)
    visual = open_clip.CLIP(32, vision, text).visual.eval()
    visual.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    images = random_images(2)
    expected = model.vision_encoder(images).pooler_output
    with torch.no_grad():
        assert (visual(images) - expected).abs().max() > 1e-5  # it has another activation than the encoder
        card = (tmp_path / "out" / "README.md").read_text()
        code = card[card.index("for module in visual") : card.index("preprocess = ")]
        exec(code, {"visual": visual, "torch": torch})
        torch.testing.assert_close(visual(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "format", "reason"),
    [
        ("siglip2", "timm", "a siglip2_vision_model encoder has no timm form"),
        ("aimv2", "timm", "a aimv2_vision_model encoder has no timm form"),
        ("dinov3", "timm", "a dinov3_vit encoder has no timm form"),
        ("siglip2", "open_clip", "a siglip2_vision_model encoder has no open_clip form"),
        ("dinov2", "open_clip", "a dinov2 encoder has no open_clip form"),
    ],
)
def test_what_has_no_form_is_refused_by_name(family: str, format: str, reason: str, tmp_path) -> None:
    save_hive(tmp_path / "model", family)
    with pytest.raises(HiveError, match=reason):
        export_encoder(tmp_path / "model", tmp_path / "out", format=format)


def test_settings_that_the_other_library_has_not_are_refused(tmp_path) -> None:
    save_hive(tmp_path / "eps", layer_norm_eps=1e-4)
    with pytest.raises(HiveError, match=r"layer_norm_eps is 0\.0001"):
        export_encoder(tmp_path / "eps", tmp_path / "out", format="timm")
    save_hive(tmp_path / "act", hidden_act="relu")
    with pytest.raises(HiveError, match="hidden_act 'relu'"):
        export_encoder(tmp_path / "act", tmp_path / "out", format="timm")
    save_hive(tmp_path / "clip", "clip", hidden_act="relu")
    with pytest.raises(HiveError, match="hidden_act 'relu': expected one of gelu, quick_gelu for open_clip"):
        export_encoder(tmp_path / "clip", tmp_path / "out", format="open_clip")
    save_hive(tmp_path / "width", intermediate_size=40)
    with pytest.raises(HiveError, match="timm has no such model of 4 blocks, width 32, 32 pixels"):
        export_encoder(tmp_path / "width", tmp_path / "out", format="open_clip")


def test_wrong_names_and_missing_libraries_are_refused(tmp_path, monkeypatch) -> None:
    save_hive(tmp_path / "model")
    own_weights = timm_format.timm_weights

    def exchanged(encoder):
        weights = own_weights(encoder)
        return weights | {first: weights[second], second: weights[first]}

    monkeypatch.setattr(timm_format, "timm_weights", exchanged)
    for pair in (("blocks.0.norm1.bias", "blocks.0.norm2.bias"), ("norm.bias", "attn_pool.norm.bias")):
        first, second = pair  # no block depends on the latter two
        with pytest.raises(HiveError, match="differ by"):
            export_encoder(tmp_path / "model", tmp_path / "out", format="timm")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(HiveError, match="timm is not installed; pip install"):
        export_encoder(tmp_path / "model", tmp_path / "out", format="timm")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(HiveError, match="open_clip is not installed; pip install"):
        export_encoder(tmp_path / "model", tmp_path / "out", format="open_clip")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
