"""The exported encoder is a stock folder with HIVE's features; a wrong one is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from export_models import PROCESSORS, save_hive
from safetensors.torch import load_file, save_file
from tiny_models import text_config, tiny_encoder

from hive_ds.errors import HiveError
from hive_ds.export import export_encoder, formats, model_folder, transformers_format
from hive_ds.export.parity import check, check_names, largest_difference
from hive_ds.export.source import Source, find_source
from hive_ds.model.identity import folder_sha256, weights_sha256
from hive_ds.model.vision import FAMILIES, encode_images


def finish(run: Path, number: int) -> Path:
    """A run's stage folder as training leaves it."""
    stage = run / f"stage{number}"
    (stage / "model").mkdir(parents=True)
    (stage / "DONE").touch()
    return stage / "model"


def pictures() -> list:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, 256, (3, 50, 70, 3), generator=generator, dtype=torch.uint8).numpy())


def patches(hidden: torch.Tensor, count: int, mask: torch.Tensor | None) -> torch.Tensor:
    return hidden[mask.bool()] if mask is not None else hidden[:, -(count // len(hidden)) :].flatten(0, 1)


@pytest.mark.parametrize("tail", ["keep", "cut"])
@pytest.mark.parametrize("family", sorted(PROCESSORS))
def test_encoder_loads_in_plain_transformers_with_equal_features(family: str, tail: str, tmp_path) -> None:
    run = tmp_path / "run"
    model = save_hive(finish(run, 3), family)
    report = export_encoder(run, tmp_path / "out", tail=tail)
    stock = getattr(transformers, FAMILIES[model.config.vision_config.model_type].model_class)
    encoder = stock.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    inputs = dict(processor(pictures(), return_tensors="pt"))
    blocks = (1, 2, 3, 4) if tail == "keep" else (1, 2, 3)
    with torch.no_grad():
        outputs = encoder(**inputs, output_hidden_states=True)
        expected = encode_images(model.vision_encoder, blocks, **inputs).by_block
    mask = inputs.get("pixel_attention_mask")
    for block, features in expected.items():
        found = patches(outputs.hidden_states[block], len(features), mask)
        torch.testing.assert_close(found, features, atol=1e-5, rtol=0)
    assert report.largest_difference <= 1e-5
    assert (report.trained_blocks, report.num_blocks) == (3, len(blocks))
    assert report.trained_sha256 == folder_sha256(run / "stage3" / "model")
    assert report.sha256 == folder_sha256(tmp_path / "out") == weights_sha256(encoder.state_dict().items())
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # the weights are no secret
    if tail == "keep":
        assert report.sha256 == report.trained_sha256
        assert all(map(torch.equal, encoder.state_dict().values(), model.vision_encoder.state_dict().values()))
    else:
        check_cut(encoder, outputs, expected[3], mask)


def check_cut(encoder: torch.nn.Module, outputs, last: torch.Tensor, mask: torch.Tensor | None) -> None:
    """It ends with the last trained block and a new norm; no untrained weight is left."""
    names = set(encoder.state_dict())
    assert not any(".3." in name or "head." in name for name in names)
    if encoder.config.model_type != "clip_vision_model":  # whose last hidden state is not normed
        normed = patches(outputs.last_hidden_state, len(last), mask)
        eps = getattr(encoder.config, "layer_norm_eps", None)
        if eps is None:
            expected = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + encoder.config.rms_norm_eps)
        else:
            expected = torch.nn.functional.layer_norm(last, last.shape[-1:], eps=eps)
        torch.testing.assert_close(normed, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("layers.2.mlp.fc2.weight", "differ by"),
        ("head.mlp.fc2.weight", "the weights read back are not those that were written"),  # no feature depends on it
    ],
)
def test_what_differs_is_refused_and_nothing_is_left(spoilt: str, message: str, tmp_path, monkeypatch) -> None:
    save_hive(tmp_path / "model")
    check = transformers_format._difference

    def spoil_then_check(job):
        weights = load_file(job.folder / "model.safetensors")
        name = next(name for name in weights if spoilt in name)
        weights[name][0, 0] += 0.01
        save_file(weights, job.folder / "model.safetensors", metadata={"format": "pt"})
        return check(job)

    monkeypatch.setattr(transformers_format, "_difference", spoil_then_check)
    with pytest.raises(HiveError, match=message):
        export_encoder(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_differs_by_more_than_rounding_or_is_no_number_is_refused() -> None:
    one, two, three = (torch.full((size,), float(size)) for size in (1, 2, 3))
    assert largest_difference([(one, one), (two, two + 0.5), (three, three)]) == 0.5
    assert largest_difference([(two, three)]) == math.inf  # not of one shape
    check(0.9e-5, "timm")
    for difference, said in ((1.1e-5, r"1\.1e-05"), (math.inf, "inf"), (math.nan, "nan")):
        with pytest.raises(HiveError, match=f"export to timm: features read back differ by {said}, expected at most"):
            check(difference, "timm")


def test_every_weight_has_its_name_in_the_other_library() -> None:
    check_names([], [], "timm")
    for names in ((["one"], []), ([], ["two"])):
        with pytest.raises(HiveError, match=re.escape(f"missing {names[0]}, unexpected {names[1]}; expected its")):
            check_names(*names, "timm")


def test_large_weights_are_sharded_and_keep_their_type(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(transformers_format, "SHARD_SIZE", "50kB")
    save_hive(tmp_path / "model").bfloat16().save_pretrained(tmp_path / "model")
    report = export_encoder(tmp_path / "model", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert report.sha256 == folder_sha256(tmp_path / "out") == folder_sha256(tmp_path / "model")
    encoder = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert encoder.dtype == torch.bfloat16
    assert formats.SHARD_SIZE == "5GB"


def test_encoder_of_a_llava_model(tmp_path) -> None:
    config = transformers.LlavaConfig(
        vision_config=tiny_encoder().config, text_config=text_config(), image_token_index=5, vision_feature_layer=-2
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    PROCESSORS["siglip"].save_pretrained(tmp_path / "model")
    report = export_encoder(tmp_path / "model", tmp_path / "out")
    assert report.sha256 == folder_sha256(tmp_path / "model")
    assert report.trained_blocks == 3
    assert "The LLM saw block 3." in (tmp_path / "out" / "README.md").read_text()


def test_which_model_is_meant(tmp_path) -> None:
    run = tmp_path / "run"
    with pytest.raises(HiveError, match="no such folder; expected that of a run, a stage or a model"):
        model_folder(run)
    first, third, fifth = finish(run, 1), finish(run, 3), finish(run, 5)
    assert model_folder(run) == third  # 4 and 5 judge the encoder, and do not change it
    assert find_source(run / "stage1") == Source(first, (run / "stage1",))
    with pytest.raises(HiveError, match=r"stage5: of its stages 5 are finished; expected one of 1, 2, 3"):
        model_folder(run / "stage5")
    (run / "stage3" / "DONE").unlink()
    assert model_folder(run) == first
    with pytest.raises(HiveError, match=r"stage3: holds neither a model \(config.json\) nor a finished stage"):
        model_folder(run / "stage3")
    for model in (first, fifth):
        (model / "config.json").write_text("{}")
    assert find_source(first) == find_source(run / "stage1")
    assert model_folder(run.rename(tmp_path / "stage2")) == tmp_path / "stage2" / "stage1" / "model"
    run = (tmp_path / "stage2").rename(run)
    (tmp_path / "recipe.yaml").touch()
    alone = fifth.rename(tmp_path / "model")
    assert find_source(alone) == Source(alone, ()), "a recipe beside it makes no stage"
    alone.rename(fifth)
    assert model_folder(fifth) == fifth


def test_a_model_of_a_run_is_known_by_every_path_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its card would know no recipe, and chat would ask it with another template than it was trained with."""
    model = finish(tmp_path / "run", 3)
    stage = model.parent
    (model / "config.json").write_text("{}")
    (tmp_path / "final").symlink_to(model)
    (tmp_path / "latest").symlink_to(stage)
    for folder, path in (
        (model, "."),
        (model, ".."),
        (stage, "."),
        (stage, "model"),
        (tmp_path, "final"),
        (tmp_path, "latest"),
    ):
        monkeypatch.chdir(folder)
        assert find_source(path) == Source(model, (stage,))
    monkeypatch.chdir(tmp_path / "run")
    assert find_source(".") == find_source("stage3") == Source(Path("stage3/model"), (Path("stage3"),))


def test_what_cannot_be_exported_is_refused(tmp_path) -> None:
    save_hive(tmp_path / "model")
    with pytest.raises(HiveError, match="format 'onnx': expected one of transformers, timm, open_clip"):
        export_encoder(tmp_path / "model", tmp_path / "out", format="onnx")
    with pytest.raises(HiveError, match="tail 'short': expected one of keep, cut"):
        export_encoder(tmp_path / "model", tmp_path / "out", tail="short")
    with pytest.raises(HiveError, match="not an empty folder"):
        export_encoder(tmp_path / "model", tmp_path / "model")
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    with pytest.raises(HiveError, match="expected a HIVE or a LLaVA-style one"):
        export_encoder(tmp_path / "encoder", tmp_path / "out")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    dropped = next(name for name in weights if name.endswith("layers.1.mlp.fc1.bias") and "vision" in name)
    del weights[dropped]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HiveError, match=r"missing \['encoder\.layers\.1\.mlp\.fc1\.bias'\], unexpected \[\]"):
        export_encoder(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
