"""Folders: base models in, HIVE models out and back, and the strict hand-over between stages."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import random_images, random_tokens, tiny_encoder, tiny_hive, tiny_language_model, vision_config
from transformers import AutoModelForCausalLM

from hive_ds.config import ModelConfig, RoutesConfig
from hive_ds.errors import HiveError
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.identity import folder_sha256
from hive_ds.model.loading import build_model, load_any, load_language_model, load_model
from hive_ds.model.weights import load_weights


def inputs():
    return {"input_ids": random_tokens(6)[None], "image_offsets": [[1]], "pixel_values": random_images(1)}


def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs()).logits


@pytest.fixture
def recipe(tmp_path):
    """A recipe's model section over base folders on disk."""
    tiny_encoder().save_pretrained(tmp_path / "vision")
    tiny_language_model("qwen2").save_pretrained(tmp_path / "llm")
    return ModelConfig(str(tmp_path / "vision"), str(tmp_path / "llm"), RoutesConfig((1, 3), (1, 3)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_saved_model_loads_through_the_auto_class_with_equal_logits(tmp_path, family, tied):
    model = tiny_hive(family, image_kv="own", qk_norm="post_rope", text_changes={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, HiveForCausalLM)
    assert (again.language_model.lm_head.weight is again.get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_load_by_name_into_a_fresh_model(tmp_path, tied):
    model = tiny_hive(image_kv="own", text_changes={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    other = tiny_hive(image_kv="own", seed=5, text_changes={"tie_word_embeddings": tied})
    assert (logits(other) - logits(model)).abs().max() > 1e-3
    report = load_weights(other, tmp_path)
    assert (report.copied, report.missing, report.unexpected) == ((), (), ())
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_tower_loads_by_name_whatever_transformers_calls_its_tensors(tmp_path, swiglu):
    """transformers 5 saves DINOv2 under the names of 4, but has others in memory, two of them for one tensor of 4."""

    def model(seed: int) -> HiveForCausalLM:
        torch.manual_seed(seed)
        config = transformers.Dinov2Config(**vision_config("dinov2").to_diff_dict() | {"use_swiglu_ffn": swiglu})
        llm = tiny_language_model(seed=seed)
        both = HiveConfig(config, llm.config, vision_blocks=(1, 3), language_layers=(1, 3))
        return HiveForCausalLM(both, transformers.Dinov2Model(config), llm).eval()

    first, other = model(0), model(5)
    first.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(first), rtol=0, atol=0)


@pytest.mark.parametrize("level", ["", "model."])
def test_dinov3_tower_loads_under_the_names_of_transformers_4_and_5(tmp_path, level):
    first, other = tiny_hive(vision="dinov3"), tiny_hive(vision="dinov3", seed=5)
    with torch.no_grad():
        for parameter in first.vision_encoder.parameters():
            parameter.normal_(std=0.2)  # no two alike, and none as a fresh model has it
    first.save_pretrained(tmp_path)
    level_of = re.compile(r"(?<=^vision_encoder\.)(model\.)?(?=layer\.)")
    weights = {level_of.sub(level, name): x for name, x in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_weights(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(first), rtol=0, atol=0)
    again = HiveForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(first), rtol=0, atol=0)


def test_names_of_either_transformers_version_load(tmp_path):
    """transformers 4 saves SigLIP towers one level deeper than transformers 5."""
    model = tiny_hive()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    flat = {name.replace("vision_encoder.vision_model.", "vision_encoder."): value for name, value in weights.items()}
    nested = {name.replace("vision_encoder.", "vision_encoder.vision_model."): value for name, value in flat.items()}
    assert flat.keys() != nested.keys()
    for form in (flat, nested):
        save_file(form, tmp_path / "model.safetensors", metadata={"format": "pt"})
        other = tiny_hive(seed=5)
        load_weights(other, tmp_path)
        torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)
        again = HiveForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
        again.save_pretrained(tmp_path / "again")
        third = HiveForCausalLM.from_pretrained(tmp_path / "again")
        torch.testing.assert_close(logits(third), logits(model), rtol=0, atol=0)


def test_build_keeps_the_base_weights(recipe):
    model = build_model(recipe, image_kv="own")
    encoder, llm = tiny_encoder(), tiny_language_model("qwen2")
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.vision_encoder.state_dict()[name], value), name
    for name, value in llm.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name], value), name
    attention = model.language_model.model.layers[1].self_attn
    assert torch.equal(attention.image_k_proj.weight, attention.k_proj.weight)
    assert torch.equal(attention.image_v_proj.bias, attention.v_proj.bias)
    assert attention.q_norm.weight.eq(1).all()
    for projector in model.projectors.values():
        bound = (6 / sum(projector.fc1.weight.shape)) ** 0.5  # xavier_uniform_
        assert bound * 0.9 < projector.fc1.weight.abs().max() <= bound
        assert projector.fc1.bias.abs().max() == 0


def test_entering_stage_2_copies_image_projections_and_changes_nothing(recipe, tmp_path):
    stage_1 = build_model(recipe, image_kv="shared")
    torch.nn.init.normal_(stage_1.language_model.model.layers[1].self_attn.q_norm.weight)
    stage_1.save_pretrained(tmp_path / "stage1")
    stage_2, report = load_model(tmp_path / "stage1", recipe, image_kv="own")
    assert len(report.copied) == 2 * 2 * 2  # two layers, k and v, weight and bias
    assert "copied 8" in str(report)
    torch.testing.assert_close(logits(stage_2), logits(stage_1), rtol=0, atol=0)
    stage_2.save_pretrained(tmp_path / "stage2")
    stage_3, report = load_model(tmp_path / "stage2", recipe, image_kv="own")
    assert report.copied == ()
    for name, value in stage_2.state_dict().items():
        assert torch.equal(stage_3.state_dict()[name], value), name


def test_another_models_folder_is_refused(recipe, tmp_path):
    tiny_hive(vision_blocks=(1, 2), image_kv="own").save_pretrained(tmp_path / "other")
    with pytest.raises(HiveError, match=r"vision_blocks \[1, 2\], but the recipe says \[1, 3\]"):
        load_model(tmp_path / "other", recipe, image_kv="own")
    with pytest.raises(HiveError, match=r"does not hold this model's weights; .*missing 6 .*unexpected 6"):
        load_weights(tiny_hive(vision_blocks=(1, 3), image_kv="own"), tmp_path / "other")
    one, two = (tiny_hive(vision_blocks=b, language_layers=b, qk_norm="none") for b in ((1,), (1, 3)))
    for saved, into, found in ((one, two, r"missing 6 .*unexpected 0"), (two, one, r"missing 0, unexpected 6")):
        saved.save_pretrained(tmp_path / "routes")
        with pytest.raises(HiveError, match=rf"does not hold this model's weights; .*{found}"):
            load_weights(into, tmp_path / "routes")
    tiny_hive(text_changes={"vocab_size": 99}).save_pretrained(tmp_path / "larger")
    with pytest.raises(HiveError, match=r"lm_head.weight has shape \(99, 48\), expected \(96, 48\)"):
        load_weights(tiny_hive(), tmp_path / "larger")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HiveError, match=r"holds no model\.safetensors"):
        load_weights(tiny_hive(), tmp_path / "empty")


def test_missing_folders_are_named(recipe, tmp_path):
    missing = ModelConfig(str(tmp_path / "nowhere"), recipe.language_model, recipe.routes)
    with pytest.raises(HiveError, match=r"vision encoder folder .*nowhere does not exist"):
        build_model(missing, image_kv="own")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HiveError, match=r"language model folder .*empty holds no config\.json"):
        load_language_model(str(tmp_path / "empty"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def set_value(key, value):
    def change(path):
        config = path.with_name("config.json")
        config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))

    return change


@pytest.mark.parametrize(
    ("part", "damage", "reason"),
    [
        ("vision", cut, "not fully covered"),
        ("vision", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "SafetensorError"),
        ("vision", lambda path: path.unlink(), "no file named"),
        ("vision", set_value("hidden_size", 64), "size mismatch|mismatched_sizes"),
        ("vision", set_value("hidden_size", "big"), "TypeError"),
        ("vision", set_value("model_type", "llama"), "encoder of type 'llama' is not supported"),
        ("llm", cut, "not fully covered"),
        ("llm", lambda path: path.with_name("config.json").write_text("[1]"), "TypeError|names no model_type"),
        ("llm", set_value("model_type", "unheard"), r"Unrecognized .* \.\.\.; expected a whole model"),
        ("llm", set_value("model_type", "siglip_vision_model"), "none that transformers loads as a causal LM"),
    ],
)
def test_damaged_base_models_are_named(recipe, tmp_path, part, damage, reason):
    """A download that broke off, pointers of Git LFS instead of weights, the model of the other key."""
    damage(tmp_path / part / "model.safetensors")
    with pytest.raises(HiveError, match=rf"{tmp_path / part}.*({reason})") as caught:
        build_model(recipe, image_kv="own")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_damaged_model_of_ours_is_named(recipe, tmp_path):
    build_model(recipe, image_kv="own").save_pretrained(tmp_path / "ours")
    cut(tmp_path / "ours" / "model.safetensors")
    for load in (lambda folder: load_model(folder, recipe, image_kv="own"), load_any, folder_sha256):
        with pytest.raises(HiveError, match=rf"{tmp_path}/ours.*not fully covered; expected a whole"):
            load(tmp_path / "ours")


def test_full_siglip_and_clip_checkpoints_give_their_vision_tower(tmp_path):
    """Hub checkpoints hold a text tower too."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    from hive_ds.model.loading import load_vision_encoder

    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    for family, config, full in (("siglip", SiglipConfig, SiglipModel), ("clip", CLIPConfig, CLIPModel)):
        values = tiny_encoder(family).config.to_dict()
        model = full(config(vision_config=values, text_config=text))
        model.save_pretrained(tmp_path / family)
        tower = load_vision_encoder(str(tmp_path / family))
        expected = {
            name.removeprefix("vision_model."): value for name, value in model.vision_model.state_dict().items()
        }
        found = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_mobilellm_loads_as_llama_without_remote_code(tmp_path):
    """The published config names remote code and calls tied embeddings `share_embedding`."""
    llama = tiny_language_model("llama", tie_word_embeddings=True)
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    config |= {
        "model_type": "mobilellm",
        "architectures": ["MobileLLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_mobilellm.MobileLLMConfig"},
        "share_embedding": True,
        "layer_sharing": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_language_model(str(tmp_path)).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = random_tokens(5)[None]
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=0)
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_sharing": True}))
    with pytest.raises(HiveError, match="layer_sharing"):
        load_language_model(str(tmp_path))


def test_a_model_to_ask_is_whole(tmp_path):
    """transformers would start what is missing at random, and say so where nobody looks."""
    tiny_hive().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.startswith("projectors."))
    rest = {name: tensor for name, tensor in weights.items() if name != lost}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HiveError, match=rf"lacks 1 weights of its HIVE model \({lost}\)"):
        load_any(tmp_path)
    save_file({**weights, "other": weights[lost].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HiveError, match=r"holds unknown 1 weights of its HIVE model \(other\)"):
        load_any(tmp_path)


def test_a_folder_runs_on_another_machine_than_it_was_trained_on(tmp_path):
    """Attention backends are the machine's: a folder from a GPU is asked on a CPU."""
    tiny_hive(attention_backend="triton", text_attention_backend="torch_flash").save_pretrained(tmp_path)
    model = load_any(tmp_path)
    assert (model.config.attention_backend, model.config.text_attention_backend) == ("auto", "auto")
    assert logits(model).isfinite().all()


def test_a_language_model_is_whole(tmp_path):
    tiny_language_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for lost in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        rest = {name: tensor for name, tensor in weights.items() if name != lost}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(HiveError, match=rf"lacks 1 of its weights \({lost}\)"):
            load_language_model(str(tmp_path))


def test_a_later_stage_takes_the_recipes_attention(tmp_path, recipe):
    model = build_model(recipe, image_kv="shared")
    model.save_pretrained(tmp_path / "stage1")
    other = dataclasses.replace(recipe, attention_backend="reference", text_attention_backend="sdpa")
    later, _ = load_model(tmp_path / "stage1", other, image_kv="own")
    assert (later.config.attention_backend, later.config.text_attention_backend) == ("reference", "sdpa")


def test_a_later_stages_longer_texts_do_not_outgrow_the_window(tmp_path, recipe):
    tiny_language_model("mistral", sliding_window=64).save_pretrained(tmp_path / "llm")
    build_model(recipe, image_kv="shared", max_length=64).save_pretrained(tmp_path / "stage1")
    load_model(tmp_path / "stage1", recipe, image_kv="own", max_length=64)
    with pytest.raises(HiveError, match=r"sliding window of 64 tokens, .* data\.max_length of 65"):
        load_model(tmp_path / "stage1", recipe, image_kv="own", max_length=65)
    with pytest.raises(HiveError, match="sliding window of 64 tokens"):
        build_model(recipe, image_kv="shared", max_length=65)
