"""Any causal LM of transformers under our attention computes what it computes under SDPA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_language_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import causal_mask_function, or_masks

from hive_ds.errors import HiveError
from hive_ds.model import attention_interface
from hive_ds.model.attention_interface import attend, key_mask, register_attention

register_attention()
LENGTHS = [5, 2, 7]


def pair(family: str, **changes: object) -> tuple[Any, Any]:
    """One model under SDPA and under ours."""
    plain = tiny_language_model(family, **changes).eval()
    # Of a copy: `from_config` writes the name into the configuration that it is given.
    ours = AutoModelForCausalLM.from_config(copy.deepcopy(plain.config), attn_implementation="hive").eval()
    ours.load_state_dict(plain.state_dict())
    assert [model.config._attn_implementation for model in (plain, ours)] == ["sdpa", "hive"]
    return plain, ours


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (length,), generator=generator) for length in LENGTHS]


def padded(side: str) -> dict[str, Tensor]:
    """The texts as rows of one batch, padded left or right."""
    width = max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.int64), torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for row, text in enumerate(texts()):
        place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(family: str, side: str) -> None:
    plain, ours = pair(family)
    batch = padded(side)
    real = batch["attention_mask"].bool()
    results = []
    for model in (plain, ours):
        logits = model(**batch).logits[real]
        logits.square().mean().backward()
        results.append((logits.detach(), {name: x.grad for name, x in model.named_parameters()}))
    (expected, expected_gradients), (found, gradients) = results
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_under_autocast(family: str) -> None:
    """As the Trainer's ``bf16=True`` has it: weights in fp32, products in bf16. A cache brings all to fp32 again."""
    plain, ours = pair(family)
    batch = padded("right")
    real = batch["attention_mask"].bool()

    def logits(model: Any) -> Tensor:
        return model(**batch, use_cache=False).logits[real]

    exact = logits(plain)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = logits(plain), logits(ours)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.5 * (expected - exact).norm() < 0.1 * exact.norm()
    of_ours, of_exact = (
        torch.autograd.grad(x.square().mean(), model.get_input_embeddings().weight)[0]
        for x, model in ((found, ours), (exact, plain))
    )
    assert (of_ours - of_exact).norm() < 0.1 * of_exact.norm()


@pytest.mark.parametrize("told_by", ["bounds", "positions"])
def test_packed_row_equals_samples_alone(told_by: str) -> None:
    plain, ours = pair("llama")
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    options: dict[str, Any] = {"position_ids": positions}
    if told_by == "bounds":
        options |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    with torch.no_grad():
        alone = torch.cat([plain(text[None]).logits[0] for text in texts()])
        found = ours(torch.cat(texts())[None], use_cache=False, **options).logits[0]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "positions",
    [[[3, 4, 5, 0, 1, 2]], [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]], [[2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]],
    ids=["begins in mid-sample", "two rows", "one row of two"],
)
def test_positions_that_start_again_begin_a_sample(positions: list[list[int]]) -> None:
    plain, ours = pair("llama")
    batch = {"input_ids": torch.arange(3, 9).repeat(len(positions), 1), "position_ids": torch.tensor(positions)}
    with torch.no_grad():
        expected = plain(**batch, use_cache=False).logits
        torch.testing.assert_close(ours(**batch, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


def test_positions_of_one_row_are_those_of_all() -> None:
    plain, ours = pair("llama")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for rows in (1, 3):
        ids = torch.arange(3, 3 + 6 * rows).view(rows, 6)
        with torch.no_grad():
            expected, found = (model(ids, position_ids=positions, use_cache=False).logits for model in (plain, ours))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_positions_of_images_begin_no_sample() -> None:
    """Of Qwen2-VL: time, row and column; an image in front has time 0 throughout."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 16, generator=generator) for heads in (4, 2, 2))
    positions = torch.tensor([[[0, 0, 0, 0, 2]], [[0, 0, 1, 1, 2]], [[0, 1, 0, 1, 2]]])
    found, _ = attend(torch.nn.Module(), q, k, v, None, position_ids=positions)
    assert torch.equal(found, attend(torch.nn.Module(), q, k, v, None)[0])


def test_positions_changed_in_place_are_read_again() -> None:
    _, ours = pair("llama")
    positions = torch.arange(8)[None].clone()
    text = torch.arange(3, 11)[None]
    with torch.no_grad():
        ours(text, position_ids=positions, use_cache=False)
        positions[0, 4:] -= 4
        found = ours(text, position_ids=positions, use_cache=False).logits
        expected = ours(text, position_ids=positions.clone(), use_cache=False).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generates_the_same(cache: str | None) -> None:
    plain, ours = pair("qwen2")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    for batch in (padded("left"), {"input_ids": texts()[0][None]}):
        assert torch.equal(ours.generate(**batch, **options), plain.generate(**batch, **options))


def test_a_mask_of_ones_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` always hands one over; by it each layer would copy its whole cache for each token."""
    _, ours = pair("llama")
    monkeypatch.setattr(attention_interface, "_padded_layout", lambda *_: pytest.fail("copied a batch without padding"))
    ours.generate(torch.stack([texts()[0], texts()[0]]), max_new_tokens=3, do_sample=False)


def test_what_a_static_cache_has_left_is_hidden() -> None:
    """Where the queries are is told in the words of transformers 4, and of 5."""
    for told in ({"cache_position": torch.arange(1, 3)}, {"q_length": 2, "q_offset": 1}):
        for given in (None, torch.ones(2, 9)):
            mask = key_mask(2, kv_length=9, attention_mask=given, **told)
            assert mask is not None
            assert torch.equal(mask, torch.ones(2, 3, dtype=torch.bool))


def test_inference_mode_changes_nothing() -> None:
    """Tensors made in it count no versions."""
    _, ours = pair("llama")
    with torch.no_grad():
        expected = ours(**padded("left")).logits
    with torch.inference_mode():
        assert torch.equal(ours(**padded("left")).logits, expected)


def test_whole_texts_alone_go_to_torchs_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []

    def flash(name: str, q: Tensor, k: Tensor, v: Tensor, texts: Any, scale: float) -> Tensor:
        scales.append(scale)
        return torch.full_like(q, 7.0)

    monkeypatch.setattr(attention_interface, "flash_attention", flash)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 16, generator=generator) for heads in (4, 2, 2))
    for scale in (None, 0.3):
        whole, _ = attend(torch.nn.Module(), q, k, v, None, scale, backend="torch_flash")
        assert torch.equal(whole, torch.full((2, 5, 4, 16), 7.0))
        step, _ = attend(torch.nn.Module(), q[:, :, -1:], k, v, None, scale, backend="torch_flash")
        keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
        expected = scaled_dot_product_attention(q[:, :, -1:], keys, values, scale=scale).transpose(1, 2)
        torch.testing.assert_close(step, expected)
    assert scales == [0.25, 0.3]


def test_prefill_in_pieces() -> None:
    _, ours = pair("llama")
    text = texts()[2][None]
    with torch.no_grad():
        whole = ours(text).logits
        first = ours(text[:, :4], use_cache=True)
        rest = ours(text[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=1e-4, atol=1e-5)


def test_names_under_which_transformers_knows_it() -> None:
    asked = ["auto", "triton", "sdpa", "reference", "torch_flash", "flash_attention_2"]
    names = ["hive", "hive_triton", "hive_sdpa", "hive_reference", "hive_torch_flash", "flash_attention_2"]
    assert [attention_interface.attention_name(backend) for backend in asked] == names
    assert set(names[:-1]) <= set(AttentionInterface().valid_keys())


def test_what_it_does_not_do_is_named() -> None:
    _, windowed = pair("mistral", sliding_window=6)
    with pytest.raises(HiveError, match=r"MistralAttention asks for: a sliding window of 6 tokens over 7 keys; load"):
        windowed(texts()[2][None])
    windowed(texts()[2][None, :6])
    with pytest.raises(HiveError, match="a cache that dropped its first 2 keys; expected all of them"):
        key_mask(1, torch.arange(4), kv_length=4, kv_offset=2)
    prefix = or_masks(causal_mask_function, lambda *_: True)
    with pytest.raises(HiveError, match="is causal, and this model shows some tokens later ones; use 'sdpa'"):
        key_mask(1, torch.arange(4), kv_length=4, mask_function=prefix)
    _, ours = pair("llama")
    with pytest.raises(HiveError, match=r"a mask of its own, \(1, 1, 7, 7\)"):
        ours(texts()[2][None], attention_mask=torch.ones(1, 1, 7, 7))
    _, dropping = pair("llama", attention_dropout=0.1)
    with pytest.raises(HiveError, match=r"attention dropout of 0\.1"):
        dropping.train()(texts()[2][None])


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"softcap": 30.0}, r"logit soft-capping \(30\.0\)"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"is_causal": False}, "attention to later tokens"),
    ],
)
def test_what_a_layer_asks_for_in_its_call_is_named(options: dict[str, Any], feature: str) -> None:
    q = torch.zeros(1, 4, 3, 16)
    with pytest.raises(
        HiveError, match=f"^attention 'hive' does not do what Module asks for: {feature}; load the model"
    ):
        attend(torch.nn.Module(), q, q, q, None, **options)


def test_layers_that_are_not_causal_are_refused() -> None:
    layer, q = torch.nn.Module(), torch.zeros(1, 4, 3, 16)
    layer.is_causal = False
    with pytest.raises(HiveError, match="attention to later tokens"):
        attend(layer, q, q, q, None)
    attend(layer, q, q, q, None, is_causal=True)
