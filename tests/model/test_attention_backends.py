"""Which attention runs where: said, refused by name, and the same numbers from all of them."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_models import tiny_cascaded, tiny_hive
from torch import Tensor
from varlen_on_cpu import serve_on_cpu

from hive_ds.errors import HiveError
from hive_ds.kernels import AttentionLayout, hierarchical_attention, tiles
from hive_ds.model import flash
from hive_ds.model.attention import HiveAttention
from hive_ds.model.attention_backends import (
    describe_attention,
    set_vision_attention,
    warm_up_attention,
)

CPU = torch.device("cpu")


def set_backends(model: Any, routed: str, un_routed: str) -> None:
    for module in hive_attention(model):
        module.backend = routed if module.routed else un_routed


def batch() -> dict[str, Any]:
    """Three samples: an image before the text, none, one in the middle of it."""
    generator = torch.Generator().manual_seed(1)
    lengths = [6, 3, 5]
    return {
        "input_ids": torch.randint(3, 96, (sum(lengths),), generator=generator),
        "labels": torch.randint(3, 96, (sum(lengths),), generator=generator),
        "text_lengths": lengths,
        "image_offsets": [[0], [], [2]],
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
    }


def loss_and_gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def compare(model: Any, routed: str, un_routed: str) -> None:
    expected, expected_gradients = loss_and_gradients(model)
    set_backends(model, routed, un_routed)
    found, gradients = loss_and_gradients(model)
    assert found == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.skipif(not tiles.INTERPRETED, reason="needs the Triton interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_whole_model_through_triton(family: str) -> None:
    model = tiny_hive(family)
    model.gradient_checkpointing_enable()
    compare(model.train(), "triton", "triton")


@pytest.mark.skipif(not tiles.INTERPRETED, reason="needs the Triton interpreter: TRITON_INTERPRET=1")
def test_generation_through_triton() -> None:
    model = tiny_hive().eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    prompts = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])
    prompts = {"input_ids": prompts, "attention_mask": (prompts > 0).long(), "image_offsets": [[1], [0]]}
    prompts["pixel_values"] = batch()["pixel_values"]
    expected = model.generate(**prompts, **options)
    set_backends(model, "triton", "triton")
    assert torch.equal(model.generate(**prompts, **options), expected)


def varlen_stand_in(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    softmax_scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """What flash_attn_varlen_func is documented to compute, of its arguments that we use."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert causal
    pieces = []
    for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
        assert end - start <= max_q == max_k
        heads = q.shape[1] // k.shape[1]
        keys, values = (x[start:end].repeat_interleave(heads, dim=1) for x in (k, v))
        scores = torch.einsum("thk,shk->hts", q[start:end], keys) * softmax_scale
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -math.inf)
        pieces.append(torch.einsum("hts,shk->thk", scores.softmax(-1), values))
    return torch.cat(pieces)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flash_attention_is_called_as_documented(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    package: Any = ModuleType("flash_attn")
    package.flash_attn_varlen_func = Mock(side_effect=varlen_stand_in)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    model = tiny_hive(family).train()
    compare(model, "auto", "flash_attention_2")
    package.flash_attn_varlen_func.assert_called()
    model.eval().generate(torch.tensor([[5, 6]]), max_new_tokens=2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_torchs_flash_attention_sees_what_ours_sees(family: str) -> None:
    serve_on_cpu()
    model = tiny_hive(family).train()
    compare(model, "auto", "torch_flash")
    model.eval().generate(torch.tensor([[5, 6]]), max_new_tokens=2)


def test_torchs_flash_attention_needs_a_gpu() -> None:
    model = tiny_hive()
    set_backends(model, "auto", "torch_flash")
    why = r"(the device is cpu|torch 2\.\S+ has no attention of variable length)"  # the latter before torch 2.11
    with pytest.raises(HiveError, match=rf"^model\.text_attention_backend is 'torch_flash', but {why}"):
        describe_attention(model, CPU, torch.bfloat16)


def test_answers_come_of_the_backends_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = tiny_hive().eval(), []

    def attend(*given: Any, backend: str, **options: Any) -> Any:
        used.append((backend, given[5].decoding))
        return hierarchical_attention(*given, backend=backend, **options)

    monkeypatch.setattr("hive_ds.model.attention.hierarchical_attention", attend)
    set_backends(model, "reference", "sdpa")
    for use_cache in (True, False):
        used.clear()
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, use_cache=use_cache)
        assert set(used) == {("reference", use_cache), ("sdpa", use_cache)}


def hive_attention(model: Any) -> list[HiveAttention]:
    return [module for module in model.modules() if isinstance(module, HiveAttention)]


def test_without_flash_attention_everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row of pitfalls: flash-attn does not install. Asked for, it is named; not asked for, nobody misses it."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises ImportError
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: None)
    model = tiny_hive().train()
    assert loss_and_gradients(model)[0] > 0
    set_backends(model, "auto", "flash_attention_2")
    with pytest.raises(HiveError, match=r"^model\.text_attention_backend is 'flash_attention_2', but flash-attn"):
        describe_attention(model, CPU, torch.bfloat16)
    with pytest.raises(HiveError, match=r"^model\.vision_attention is 'flash_attention_2', which does not work here: "):
        set_vision_attention(model, "flash_attention_2")


def test_backends_are_said_with_their_reasons() -> None:
    model = tiny_hive()
    assert describe_attention(model, CPU, torch.float32) == [
        "attention of 2 routed LLM layers: sdpa (no GPU)",
        "attention of 3 un-routed LLM layers: sdpa (no GPU)",
        "attention of the vision encoder: sdpa, by transformers",
    ]
    gpu = torch.device("cuda")
    assert describe_attention(model, gpu, torch.bfloat16)[:2] == [
        "attention of 2 routed LLM layers: triton (a GPU and Triton)",
        "attention of 3 un-routed LLM layers: triton (a GPU and Triton)",
    ]
    why = "q is torch.float64; expected torch.bfloat16, torch.float16 or torch.float32"
    assert describe_attention(model, gpu, torch.float64)[0] == f"attention of 2 routed LLM layers: sdpa ({why})"
    set_vision_attention(model, "eager")
    set_backends(model, "reference", "sdpa")
    assert describe_attention(model, gpu, torch.bfloat16) == [
        "attention of 2 routed LLM layers: reference (asked for)",
        "attention of 3 un-routed LLM layers: sdpa (asked for)",
        "attention of the vision encoder: eager, by transformers",
    ]
    for backends, key in ((("triton", "auto"), "attention_backend"), (("auto", "triton"), "text_attention_backend")):
        set_backends(model, *backends)
        with pytest.raises(HiveError, match=rf"^model\.{key}: backend is 'triton', but q is torch.float64; expected"):
            describe_attention(model, gpu, torch.float64)
    with pytest.raises(HiveError, match=r"^model\.vision_attention is 'flash', which does not work here: "):
        set_vision_attention(model, "flash")


def test_only_triton_is_warmed_up() -> None:
    assert warm_up_attention(tiny_hive(), CPU, torch.float32, answers=True) == 0


@pytest.mark.parametrize("answers", [True, False])
def test_the_models_own_kernels_are_warmed_up(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    """Decoding where questions are asked; what a cascaded model's attention gets comes rotated."""
    asked: list[dict[str, Any]] = []

    def record(**shape: Any) -> float:
        asked.append(shape)
        return 1.5

    monkeypatch.setattr("hive_ds.model.attention_backends.warm_up", record)
    gpu = torch.device("cuda")
    shape = {"heads": 6, "groups": 2, "head_dim": 32, "dtype": torch.bfloat16, "device": gpu, "decoding": answers}
    assert warm_up_attention(tiny_hive(qk_norm="post_rope"), gpu, torch.bfloat16, answers=answers) == 3
    assert asked == [shape | {"qk_norm": norm, "rotate": True} for norm in ("none", "post_rope")]
    asked.clear()
    assert warm_up_attention(tiny_cascaded(), gpu, torch.bfloat16, answers=answers) == 1.5
    assert asked == [shape | {"qk_norm": "none", "rotate": False}]


def test_tables_are_prepared_for_the_layers_heads_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """By tiles of others the kernels would leave rows out."""
    monkeypatch.setattr("hive_ds.model.attention.prepare_layout", lambda layout, **shape: (layout, shape))
    layout = AttentionLayout.build([3], [[]], [[]])
    attention = hive_attention(tiny_hive())[0]
    assert attention.shared_fields(layout, torch.bfloat16) == {}
    attention.prepared = True
    shape = {"heads": 6, "groups": 2, "head_dim": 32, "dtype": torch.bfloat16}
    assert attention.shared_fields(layout, torch.bfloat16) == {"tables": (layout, shape)}


@pytest.mark.parametrize("name", flash.FLASH_BACKENDS)
def test_where_a_librarys_flash_attention_does_not_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(flash, "_missing", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    def refusal(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return flash.flash_attention_refusal(name, torch.device("cuda"), dtype, head_dim)

    assert refusal((7, 5), torch.bfloat16, 64) == "the GPU is Tesla T4; expected one of Ampere or later"
    assert refusal((8, 0), torch.float32, 64) == "the dtype is torch.float32; expected torch.bfloat16 or torch.float16"
    for head_dim in (60, 264):
        found = refusal((8, 0), torch.float16, head_dim)
        assert found == f"the head dim is {head_dim}; expected a multiple of 8, at most 256"
    assert refusal((8, 0), torch.bfloat16, 256) is None
    assert refusal((9, 0), torch.float16, 8) is None


def test_an_attention_without_windows_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10 has one, of all tokens before and after."""
    monkeypatch.setattr(flash, "_OPTIONS", ("query", "key", "value", "is_causal", "scale"))
    found = flash.flash_attention_refusal("torch_flash", torch.device("cuda"), torch.bfloat16, 64)
    assert found == f"torch {torch.__version__} has no attention of variable length with a window; expected torch 2.11"
