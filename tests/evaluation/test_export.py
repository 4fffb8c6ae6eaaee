"""The exported encoder is a stock folder with HIVE's features; a wrong one is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scene_models import save_scene_model
from tiny_models import tiny_hive

from hive_ds import export
from hive_ds.data.scenes_samples import question_samples
from hive_ds.errors import HiveError
from hive_ds.export import export_encoder, model_folder
from hive_ds.model.vision import encode_images


def finish(run: Path, number: int) -> Path:
    """A run's stage folder as training leaves it."""
    stage = run / f"stage{number}"
    (stage / "model").mkdir(parents=True)
    (stage / "DONE").touch()
    return stage / "model"


def test_encoder_loads_in_plain_transformers_with_equal_features(tmp_path) -> None:
    run = tmp_path / "run"
    model, processor = save_scene_model(finish(run, 2))
    report = export_encoder(run, tmp_path / "out")
    encoder = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out").eval()
    pictures = [sample.images[0] for sample in question_samples(0, "q", 3, 64)]
    ours = processor(["<image>"] * 3, pictures)["pixel_values"]
    stock = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert type(stock).__name__.startswith("SiglipImageProcessor")
    with torch.no_grad():
        hidden_states = encoder(ours, output_hidden_states=True).hidden_states
        expected = encode_images(model.vision_encoder, (1, 2, 3, 4), ours).by_block
    for block, features in expected.items():
        torch.testing.assert_close(hidden_states[block].flatten(0, 1), features, atol=1e-5, rtol=0)
    # the whole encoder is there, the tail that was never routed included
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    original = dict(model.vision_encoder.named_parameters())
    assert len(kept) == len(original)
    for name, tensor in original.items():
        assert torch.equal(kept[name.removeprefix("vision_model.")], tensor)
    assert report.largest_difference <= 1e-5
    assert (report.trained_blocks, report.num_blocks) == (3, 4)
    assert report.sha256 == hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Blocks 4 to 4" in card
    assert "hidden_states[3]" in card
    assert report.sha256 in card


@pytest.mark.parametrize("family", ["clip", "dinov2", "dinov2_with_registers", "siglip2"])
def test_other_families(family: str, tmp_path) -> None:
    processors = {
        "clip": transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        "dinov2": transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        "siglip2": transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=15),
    }
    tiny_hive(vision=family).save_pretrained(tmp_path / "model")
    processors[family.removesuffix("_with_registers")].save_pretrained(tmp_path / "model")
    report = export_encoder(tmp_path / "model", tmp_path / "out")
    assert report.largest_difference <= 1e-5
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 4


def test_features_that_differ_are_refused(tmp_path, monkeypatch) -> None:
    save_scene_model(tmp_path / "model")
    check = export._largest_difference

    def spoil_then_check(model, folder, processor):
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if "layers.2.mlp.fc2.weight" in name)
        weights[name][0, 0] += 0.01
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return check(model, folder, processor)

    monkeypatch.setattr(export, "_largest_difference", spoil_then_check)
    with pytest.raises(HiveError, match="differ by"):
        export_encoder(tmp_path / "model", tmp_path / "out")


def test_which_model_is_meant(tmp_path) -> None:
    run = tmp_path / "run"
    with pytest.raises(HiveError, match="neither a model folder"):
        model_folder(run)
    first, third = finish(run, 1), finish(run, 3)
    assert model_folder(run) == third
    (run / "stage3" / "DONE").unlink()
    assert model_folder(run) == first
    (third / "config.json").write_text("{}")
    assert model_folder(third) == third
    with pytest.raises(HiveError, match="not an empty folder"):
        export_encoder(third, run)
