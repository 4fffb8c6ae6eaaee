"""LLMs that HIVE cannot reproduce are refused by name when the model is built."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from tiny_models import text_config, tiny_hive, tiny_language_model
from transformers import AutoConfig, AutoModelForCausalLM

from hive_ds.errors import HiveError
from hive_ds.model.language import check_language_model, check_window

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
MIXTRAL = partial(transformers.MixtralConfig, **SMALL, num_local_experts=2)
PHIMOE = partial(transformers.PhimoeConfig, **SMALL, num_local_experts=2)
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
EXAONE = {**SMALL, "num_hidden_layers": 4, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


CASES = {
    "gpt2": (
        lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
        "not `model.embed_tokens`",
    ),
    "opt": (
        lambda: transformers.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        "not `model.embed_tokens`",
    ),
    "phi3": (lambda: transformers.Phi3Config(**SMALL), "fused qkv projections"),
    "stablelm": (
        lambda: transformers.StableLmConfig(**{**SMALL, "partial_rotary_factor": 0.25}),
        "partial rotary positions",
    ),
    "cohere": (lambda: transformers.CohereConfig(**SMALL), "interleaved rotary positions"),
    "gemma2": (lambda: transformers.Gemma2Config(**SMALL), "soft-capping"),
    "gemma": (lambda: transformers.GemmaConfig(**SMALL), "embeddings scaled"),
    "granite": (lambda: transformers.GraniteConfig(**SMALL, embedding_multiplier=12.0), "embedding_multiplier"),
    "olmo2": (lambda: transformers.Olmo2Config(**SMALL), "query norm over all heads at once"),
    "gpt_oss": (
        lambda: transformers.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
        "attention sinks",
    ),
    "bitnet": (lambda: transformers.BitNetConfig(**SMALL), "`attn_sub_norm` in its attention"),
    "hunyuan": (lambda: transformers.HunYuanDenseV1Config(**SMALL), "`query_layernorm` in its attention"),
    "olmo": (lambda: transformers.OlmoConfig(**SMALL), "no RMS norms"),
    "falcon_h1": (lambda: transformers.FalconH1Config(**SMALL, **MAMBA), r"not `model.embed_tokens`.*`model.norm`"),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**SMALL), "a query norm of another kind"),
    **(
        {
            "mixtral": (MIXTRAL, "handed rotary tables"),
            "phimoe": (PHIMOE, "rotary frequencies that are not one list"),
        }
        if transformers.__version__.startswith("4.")
        else {
            "ministral3": (lambda: AutoConfig.for_model("ministral3", **SMALL), "must be handed `position_ids`"),
            "exaone_moe": (lambda: AutoConfig.for_model("exaone_moe", **EXAONE), "layers without rotary positions"),
        }
    ),
    "dropout": (lambda: text_config("llama", attention_dropout=0.1), "attention dropout of 0.1"),
    "dynamic": (lambda: text_config("llama", rope_scaling=DYNAMIC), "length-dependent rotary positions"),
    "smollm3": (lambda: transformers.SmolLM3Config(**SMALL, no_rope_layers=[1, 0]), "layers without rotary"),
}


@pytest.mark.parametrize("case", CASES)
def test_unsupported_llms_are_refused_by_name(case):
    config, message = CASES[case]
    model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(HiveError, match=rf"'{model.config.model_type}' is not supported: it has .*({message})"):
        check_language_model(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_supported_llms_pass(family):
    model = tiny_language_model(family)
    check_language_model(model)
    check_window(model.config, 512)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_shorter_than_the_longest_text_is_refused(family):
    changes = {"sliding_window": 64} | (
        {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}
    )
    config = tiny_language_model(family, **changes).config
    check_window(config, 64)
    with pytest.raises(HiveError, match=r"sliding window of 64 tokens.*data.max_length of 65"):
        check_window(config, 65)


def test_a_window_that_no_layer_has_is_none():
    check_window(text_config("qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=99), 65)


def test_text_past_the_window_is_refused_at_run_time():
    model = tiny_hive("mistral", text_changes={"sliding_window": 8})
    model(torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(HiveError, match="a text of 9 tokens is longer than the sliding window"):
        model(torch.ones(1, 9, dtype=torch.int64))
