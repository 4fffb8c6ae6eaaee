"""One hash of a vision tower, wherever its weights are kept; another for any other weights."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_models import text_config, tiny_encoder, tiny_hive

from hive_ds.errors import HiveError
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.identity import folder_sha256, weights_sha256
from hive_ds.model.vision import vision_class


def sha256(model: torch.nn.Module) -> str:
    return weights_sha256(model.state_dict().items())


@pytest.mark.parametrize("family", ["siglip", "siglip2", "clip", "dinov2", "dinov2_with_registers", "dinov3", "aimv2"])
def test_a_tower_has_one_hash_wherever_it_is_kept(family: str, tmp_path) -> None:
    model = tiny_hive(vision=family)
    expected = sha256(model.vision_encoder)
    model.save_pretrained(tmp_path / "hive", max_shard_size="100kB")
    assert len(list((tmp_path / "hive").glob("*.safetensors"))) > 1
    model.vision_encoder.save_pretrained(tmp_path / "encoder")
    encoder = vision_class(model.vision_encoder.config).from_pretrained(tmp_path / "encoder")
    assert {
        sha256(model),
        folder_sha256(tmp_path / "hive"),
        sha256(HiveForCausalLM.from_pretrained(tmp_path / "hive")),
        folder_sha256(tmp_path / "encoder"),
        sha256(encoder),
        sha256(encoder.bfloat16()),
    } == {expected}


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_the_tower_inside_of_a_llava_model_has_the_same_hash(family: str, tmp_path) -> None:
    encoder = tiny_encoder(family)
    config = transformers.LlavaConfig(vision_config=encoder.config, text_config=text_config(), image_token_index=5)
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    model.save_pretrained(tmp_path)
    assert {sha256(model), folder_sha256(tmp_path)} == {sha256(encoder)}


def test_names_of_transformers_4_and_5_hash_alike_and_order_does_not_matter(tmp_path) -> None:
    exact = {"embeddings.weight": range(6), "head.bias": [1.0]}
    weights = {"embeddings.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.tensor(1.0)}
    expected = weights_sha256(weights.items())
    assert weights_sha256((f"vision_model.{name}", tensor) for name, tensor in reversed(weights.items())) == expected
    save_file({f"vision_model.{name}": tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    assert folder_sha256(tmp_path) == expected
    # the form itself: a change of it would part old results from new ones
    in_bf16 = {name: b"".join(struct.pack("<f", value)[2:] for value in values) for name, values in exact.items()}
    lines = [
        f"embeddings.weight (2, 3) {hashlib.sha256(in_bf16['embeddings.weight']).hexdigest()}",
        f"head.bias () {hashlib.sha256(in_bf16['head.bias']).hexdigest()}",
    ]
    assert expected == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_dinov2_hashes_alike_under_both_namings(tmp_path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    encoder = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=True))
    encoder.save_pretrained(tmp_path)
    assert folder_sha256(tmp_path) == sha256(encoder)  # transformers 5 saves what it names so under the names of 4
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(4, 3, generator=generator) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    block = "encoder.layer.0."
    new = {f"{block}attention.{name}_proj.weight": values[name] for name in "qkvo"}
    new |= {f"{block}mlp.{name}_proj.weight": values[name] for name in ("gate", "up", "down")}
    words = {"query": "q", "key": "k", "value": "v"}
    old = {f"{block}attention.attention.{word}.weight": values[name] for word, name in words.items()} | {
        f"{block}attention.output.dense.weight": values["o"],
        f"{block}mlp.weights_in.weight": torch.cat([values["gate"], values["up"]]),
        f"{block}mlp.weights_out.weight": values["down"],
    }
    assert weights_sha256(old.items()) == weights_sha256(new.items())


def test_other_weights_have_another_hash() -> None:
    weights = dict(tiny_encoder().state_dict())
    name = next(name for name in weights if name.endswith("fc1.weight"))
    changed = weights[name].clone()
    changed[0, 0] = torch.nextafter(changed[0, 0].bfloat16(), torch.tensor(1.0).bfloat16())
    variants = [
        weights,
        weights | {name: changed},
        weights | {name: weights[name].T},
        {key: tensor for key, tensor in weights.items() if key != name},
        {(f"{key}2" if key == name else key): tensor for key, tensor in weights.items()},
    ]
    assert len({weights_sha256(variant.items()) for variant in variants}) == len(variants)


def test_nothing_has_no_hash(tmp_path) -> None:
    with pytest.raises(HiveError, match="no weights"):
        weights_sha256([])
    with pytest.raises(HiveError, match=r"holds no model\.safetensors"):
        folder_sha256(tmp_path)
