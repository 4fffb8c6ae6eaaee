"""The models used without the commands: through what transformers, PEFT and a script of one's own call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import GREEDY, prompts, random_tokens, tiny_cascaded, tiny_hive
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from hive_ds.model.configuration import HiveConfig, config_to_load
from hive_ds.model.generation import CACHE_NAME
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.loading import load_any


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**prompts()).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_keeps_the_logits_of_the_old_tokens(tied: bool, tmp_path: Path) -> None:
    model = tiny_hive(text_changes={"tie_word_embeddings": tied})
    assert model.config.tie_word_embeddings == tied
    before = logits(model)
    model.resize_token_embeddings(120)
    found = logits(model)
    assert found.shape[-1] == 120
    torch.testing.assert_close(found[..., :96], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(HiveForCausalLM.from_pretrained(tmp_path)), found)


def test_a_subfolder_a_config_by_its_path_and_values_of_ones_own_load(tmp_path: Path) -> None:
    model = tiny_hive()
    model.save_pretrained(tmp_path / "stage5")
    path = str(tmp_path / "stage5")
    for load, name, more in (
        (HiveForCausalLM, tmp_path, {"subfolder": "stage5"}),
        (AutoModelForCausalLM, tmp_path, {"subfolder": "stage5"}),
        (HiveForCausalLM, path, {"config": path}),
        (HiveForCausalLM, path, {"attention_backend": "reference"}),
    ):
        again = load.from_pretrained(name, **more)
        assert again.config.attention_backend == more.get("attention_backend", "auto")
        torch.testing.assert_close(logits(again), logits(model))


def test_the_config_of_a_revision_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(HiveConfig, "from_pretrained", lambda name, **more: seen.update(more, name=name))
    given = dict.fromkeys(("subfolder", "revision", "cache_dir", "force_download", "local_files_only", "token"), "x")
    config_to_load("me/model", {**given, "dtype": torch.float16})
    assert seen == {**given, "name": "me/model"}


def test_embeddings_are_called_on_rows_of_tokens() -> None:
    """As hooks on them expect, such as NEFTune's."""
    model, shapes = tiny_hive(), []
    model.get_input_embeddings().register_forward_hook(lambda *call: shapes.append(call[2].shape))
    logits(model)
    assert shapes == [(1, 18, 48)]


@torch.no_grad()
def test_a_cache_goes_on_in_the_next_turn() -> None:
    """With the images of the first turn, which nobody gives again."""
    model, inputs = tiny_hive(), prompts()
    images = {name: inputs[name] for name in ("image_offsets", "pixel_values")}
    first = model.generate(**inputs, **GREEDY, max_new_tokens=4, return_dict_in_generate=True)
    asked = torch.cat([first.sequences, random_tokens(6, seed=1).view(2, 3)], dim=1)
    expected = model.generate(asked, **images, **GREEDY, max_new_tokens=6)
    cache = first[CACHE_NAME]
    with pytest.raises(ValueError, match="give images in the first call only"):
        model.generate(asked, **images, **GREEDY, max_new_tokens=6, past_key_values=cache)
    assert torch.equal(model.generate(asked, **GREEDY, max_new_tokens=6, past_key_values=cache), expected)
    assert cache.get_seq_length() == asked.shape[1] + 5  # nobody has asked for what follows the last token
    for call in (model.generate, model):
        with pytest.raises(ValueError, match="past_key_values is a DynamicCache; expected the HiveCache"):
            call(asked, past_key_values=DynamicCache())


@pytest.mark.parametrize("rows", [[0, 1], [0, 0, 1, 1]])
@torch.no_grad()
def test_padding_behind_an_answer_that_ended_early_is_forgotten(rows: list[int]) -> None:
    """In every turn after it, and also where another answer to the same prompt is longer by that."""
    model, inputs = tiny_hive(), prompts()
    images = model.encode_prompt_images(inputs["pixel_values"], inputs["image_offsets"], 2)
    whole, mask = inputs["input_ids"][rows], torch.ones(len(rows), 9, dtype=torch.int64)
    cache = model(whole, prompt_images=images, use_cache=True).past_key_values
    pixels = inputs["pixel_values"].split([1, 2])
    each = {"image_offsets": [inputs["image_offsets"][row] for row in rows]}
    each["pixel_values"] = torch.cat([pixels[row] for row in rows])
    for seed in range(1, 4):
        new = random_tokens(4 * len(rows), seed).view(-1, 4)
        whole, mask = torch.cat([whole, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
        found = model(new, attention_mask=mask, past_key_values=cache).logits
        expected = model(whole, attention_mask=mask, **each).logits[:, -4:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        mask[0, -2:] = 0


@torch.no_grad()
def test_a_conversation_in_which_an_answer_ended_early_goes_on_as_without_a_cache() -> None:
    model, inputs = tiny_hive(), prompts()
    images = {name: inputs[name] for name in ("image_offsets", "pixel_values")}
    ends = int(model.generate(**inputs, **GREEDY, max_new_tokens=2)[0, -1])
    first = model.generate(**inputs, **{**GREEDY, "eos_token_id": ends}, max_new_tokens=6, return_dict_in_generate=True)
    assert (first.sequences == 0).sum(dim=1).tolist() in ([4, 0], [5, 0])
    asked = torch.cat([first.sequences, random_tokens(6, seed=1).view(2, 3)], dim=1)
    expected = model.generate(asked, **images, **GREEDY, max_new_tokens=6)
    assert torch.equal(model.generate(asked, **GREEDY, max_new_tokens=6, past_key_values=first[CACHE_NAME]), expected)


@torch.no_grad()
def test_a_mask_that_leaves_out_tokens_in_the_middle_of_what_a_cache_holds_is_refused() -> None:
    model, ids = tiny_hive(), random_tokens(18).view(2, 9)
    cache = model(ids, use_cache=True).past_key_values
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="attention_mask leaves out tokens of row 1 before others"):
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_on_the_right_that_transformers_finds_itself_is_refused(beams: int) -> None:
    inputs = prompts()
    inputs["input_ids"][1, 7:] = 0
    with pytest.raises(ValueError, match="prompt 1 ends with padding"):
        tiny_hive().generate(**inputs, pad_token_id=0, max_new_tokens=2, num_beams=beams)


def test_the_prompt_that_ends_with_padding_is_named() -> None:
    mask = torch.tensor([[1, 1], [1, 0]])
    with pytest.raises(ValueError, match="prompt 1 ends with padding"):
        tiny_hive().prepare_inputs_for_generation(torch.ones_like(mask), attention_mask=mask)


@torch.no_grad()
def test_a_cache_grows_with_the_text() -> None:
    """Past the room that it begins with, in the first call and later."""
    model, tokens = tiny_hive(), random_tokens(90).view(2, 45)
    images = {name: prompts()[name] for name in ("image_offsets", "pixel_values")}
    cache, pieces = None, []
    for piece in tokens.split([17, 18, 1, 9], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True, **(images if cache is None else {}))
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens, **images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
@pytest.mark.parametrize("lengths", [[0, 4, 5], [4, 0, 5], [4, 5, 0]])
@torch.no_grad()
def test_a_sample_without_a_token_changes_nothing(make: Any, lengths: list[int]) -> None:
    model, ids = make(), random_tokens(9)
    expected = model(ids, labels=ids, text_lengths=[4, 5]).loss
    torch.testing.assert_close(model(ids, labels=ids, text_lengths=lengths).loss, expected)


@torch.no_grad()
def test_an_image_past_the_last_token_of_a_prompt_stands_behind_it() -> None:
    """However far: tokens of the next prompt do not come before it."""
    model, inputs = tiny_cascaded(), prompts()
    found = [
        model.generate(**{**inputs, "image_offsets": [[0, offset], [2]]}, **GREEDY, max_new_tokens=4)
        for offset in (9, 14)
    ]
    assert torch.equal(*found)


@torch.no_grad()
def test_a_step_without_a_new_token_reads_the_last_one() -> None:
    """As a rank does that waits for others under ZeRO-3."""
    model, inputs = tiny_hive(), prompts()
    cache = model(**inputs, use_cache=True).past_key_values
    step = model.prepare_inputs_for_generation(inputs["input_ids"], past_key_values=cache)
    assert torch.equal(step["input_ids"], inputs["input_ids"][:, -1:])


@pytest.mark.parametrize("keep", [1, 2, 9, 20])
@torch.no_grad()
def test_kept_logits_are_the_last_ones(keep: int) -> None:
    """Zeros at padding among them."""
    model, mask = tiny_hive(), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 8:] = 0
    whole = model(**prompts(), attention_mask=mask).logits
    kept = model(**prompts(), attention_mask=mask, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, whole[:, -keep:])


def test_a_model_answers_by_the_generation_config_of_the_llm(tmp_path: Path) -> None:
    model = tiny_hive()
    assert model.generation_config is model.language_model.generation_config
    model.generation_config.update(repetition_penalty=3.0)
    model.save_pretrained(tmp_path)
    assert HiveForCausalLM.from_pretrained(tmp_path).generation_config.repetition_penalty == 3.0


def test_without_a_length_twenty_tokens_are_written() -> None:
    """As transformers does for prompts of tokens; the two images of a prompt take more places than that."""
    model, inputs = tiny_cascaded(), prompts()
    assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, max_new_tokens=20))


def test_lengths_of_a_generation_config_count_no_image() -> None:
    """A cascaded model's, given or its own."""
    model, inputs = tiny_cascaded(), prompts()
    whole = model.generate(**inputs, **GREEDY, max_new_tokens=6)
    ends = sorted(set(whole[:, 9].tolist()))
    held = {"do_sample": False, "pad_token_id": 0, "eos_token_id": ends, "max_length": 15, "min_length": 12}
    expected = model.generate(**inputs, **held)
    assert expected.shape[1] > 12
    assert torch.equal(model.generate(**inputs, generation_config=GenerationConfig(**held)), expected)
    short = GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=4)
    assert torch.equal(model.generate(**inputs, generation_config=short), whole[:, :13])
    model.language_model.generation_config.update(max_length=15)
    assert torch.equal(model.generate(**inputs, **GREEDY), whole)


@pytest.mark.parametrize("vision", ["siglip", "clip", "dinov2", "dinov3", "aimv2"])
@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
def test_a_processors_fp32_pixels_fit_a_model_in_bf16(make: Any, vision: str) -> None:
    model = make(vision=vision)
    torch.testing.assert_close(logits(model.bfloat16()).float(), logits(model.float()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
def test_a_model_to_ask_is_in_the_dtype_asked_for_and_does_not_train(make: Any, tmp_path: Path) -> None:
    make().train().save_pretrained(tmp_path)
    for more, dtype in (((), torch.float32), ((torch.bfloat16,), torch.bfloat16)):
        model = load_any(tmp_path, *more)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not any(module.training for module in model.modules())
