"""Ranks that read no weights make the model of rank 0: of every family, and nothing but weights has to be sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_encoder, tiny_language_model

from hive_ds.config import ModelConfig, RoutesConfig
from hive_ds.model.loading import build_cascaded, build_model, generating_part, load_cascaded
from hive_ds.model.unread import unread_model
from hive_ds.model.vision import FAMILIES

ENCODERS = ["siglip", "siglip2", "clip", "dinov2", "dinov2_with_registers", "dinov3", "aimv2"]
LLMS = ["llama", "qwen2", "qwen3", "mistral"]


def attention_of(model: Any) -> list[str]:
    return [part.config._attn_implementation for part in (model.vision_encoder, model.language_model)]


def expect_same(model: Any, section: ModelConfig) -> None:
    """Another rank's model is ``model`` but for the values of its weights, which fill its state."""
    other = unread_model(model.config, generating_part(model).generation_config, section)
    weights = dict(model.named_parameters())
    assert {name: x.shape for name, x in other.named_parameters()} == {name: x.shape for name, x in weights.items()}
    assert other.state_dict().keys() == model.state_dict().keys()
    whole = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert whole == {parameter.data_ptr() for parameter in weights.values()}, "a buffer would have to be sent too"
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(other.named_buffers()).keys()
    for name, buffer in other.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name
    assert str(other) == str(model)
    assert [attention_of(part) for part in (other, model)] == [["eager", attention_of(model)[1]]] * 2
    assert other.config.to_dict() == model.config.to_dict()


@pytest.fixture
def section(tmp_path: Path, request: pytest.FixtureRequest) -> ModelConfig:
    encoder, language_model = request.param
    tiny_encoder(encoder).save_pretrained(tmp_path / "vision")
    tiny_language_model(language_model).bfloat16().save_pretrained(tmp_path / "llm")
    routes = RoutesConfig((1, 3), (1, 3))
    return ModelConfig(str(tmp_path / "vision"), str(tmp_path / "llm"), routes, vision_attention="eager")


PAIRS = [*((encoder, "llama") for encoder in ENCODERS), *(("siglip", language_model) for language_model in LLMS[1:])]


def test_every_encoder_is_among_them() -> None:
    assert len(ENCODERS) == len(FAMILIES)


@pytest.mark.parametrize("section", PAIRS, indirect=True, ids="-".join)
def test_hive_model_of_another_rank(section: ModelConfig) -> None:
    expect_same(build_model(section, image_kv="own"), section)


@pytest.mark.parametrize("section", [*PAIRS, ("siglip", "gemma3")], indirect=True, ids="-".join)
def test_cascaded_model_of_another_rank(section: ModelConfig, tmp_path: Path) -> None:
    built = build_cascaded(section, image_token_id=96)  # one more than the LLM knows
    assert built.language_model.get_input_embeddings().num_embeddings == 97
    expect_same(built, section)
    built.save_pretrained(tmp_path / "stage")
    loaded, _ = load_cascaded(tmp_path / "stage", section)
    expect_same(loaded, section)
