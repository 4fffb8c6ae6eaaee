"""The cascaded model is a stock Llava: same logits, same loss, same answers, same folder; packed, padded or alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, random_images, random_tokens, tiny_cascaded
from torch import Tensor
from transformers import LlavaForConditionalGeneration, masking_utils

from hive_ds.constants import IGNORE_INDEX
from hive_ds.errors import HiveError
from hive_ds.model.cascaded import CascadedForCausalLM
from hive_ds.model.loading import load_any

STOCK = ("siglip", "clip", "dinov2", "aimv2")
"""Encoders that a stock Llava can hold."""
IMAGE = VOCABULARY - 1
LENGTHS, OFFSETS = [6, 3, 8, 4], [[2], [], [0, 5], [4]]
"""Texts and media offsets of four samples: one image, none, two, and one that no text token sees."""
PATCHES = 16


def texts() -> list[Tensor]:
    return [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]


def packed() -> dict[str, Any]:
    return {
        "input_ids": torch.cat(texts()),
        "text_lengths": LENGTHS,
        "image_offsets": OFFSETS,
        "pixel_values": random_images(4),
    }


def padded(side: str) -> dict[str, Any]:
    width = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts()):
        place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "image_offsets": OFFSETS,
        "pixel_values": random_images(4),
    }


def stock_inputs() -> dict[str, Tensor]:
    """The same samples as stock transformers wants them: placeholders in the text, padded on the left."""
    images, rows = iter(random_images(4)), []
    seen = []
    for text, offsets in zip(texts(), OFFSETS, strict=True):
        ids = text.tolist()
        for offset in sorted(offsets, reverse=True):
            ids[offset:offset] = [IMAGE] * PATCHES
        seen += [next(images) for _ in offsets]
        rows.append(ids)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.stack(seen)}


def stock_of(model: CascadedForCausalLM, folder: Path) -> LlavaForConditionalGeneration:
    model.save_pretrained(folder)
    stock, report = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return stock.eval()


@pytest.mark.parametrize("vision", [*STOCK, "dinov2_with_registers", "dinov3"])
@torch.no_grad()
def test_packed_is_single_is_padded(vision: str) -> None:
    model = tiny_cascaded("qwen2", vision)
    logits = model(**packed()).logits
    images, alone = iter(random_images(4)), []
    for text, offsets in zip(texts(), OFFSETS, strict=True):
        pixels = torch.stack([next(images) for _ in offsets]) if offsets else None
        alone.append(model(text, text_lengths=[len(text)], image_offsets=[offsets], pixel_values=pixels).logits)
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
    for side in ("left", "right"):
        batch = padded(side)
        found = model(**batch).logits[batch["attention_mask"].bool()]
        torch.testing.assert_close(logits, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vision", STOCK)
@pytest.mark.parametrize("tied", [True, False])
def test_equals_stock_llava(vision: str, tied: bool, tmp_path: Path) -> None:
    """Logits and loss to 1e-5, greedy answers with and without cache and penalty, from the saved folder."""
    model = tiny_cascaded("qwen2", vision, text_changes={"tie_word_embeddings": tied})
    stock = stock_of(model, tmp_path)
    assert (stock.config.tie_word_embeddings, stock.config.image_seq_length) == (tied, PATCHES)
    inputs = stock_inputs()
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    with torch.no_grad():
        expected = stock(**inputs).logits[is_text]
        torch.testing.assert_close(model(**packed()).logits, expected, rtol=0, atol=1e-5)
        # The first token of a text: stock would predict it from the padding before it.
        first = inputs["attention_mask"].cumsum(dim=1) == 1
        labels = inputs["input_ids"].masked_fill(~is_text | first, IGNORE_INDEX)
        labels[0, -2] = IGNORE_INDEX
        expected_loss = stock(**inputs, labels=labels).loss
        ids = torch.cat(texts())
        ids[4] = IGNORE_INDEX
        loss = model(**packed(), labels=ids).loss
        torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-5)
        per_item = model(**packed(), labels=ids, num_items_in_batch=7).loss
        torch.testing.assert_close(per_item, expected_loss * (labels != IGNORE_INDEX).sum() / 7, rtol=0, atol=1e-4)
    batch = padded("left")
    for use_cache, penalty in ((True, 1.0), (False, 1.0), (True, 3.0)):
        options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
        options["repetition_penalty"] = penalty
        answers = stock.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        found = model.generate(**batch, **options, use_cache=use_cache)
        assert torch.equal(found[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        assert torch.equal(found[:, batch["input_ids"].shape[1] :], answers)


def test_beams_continue_their_prompts() -> None:
    model = tiny_cascaded()
    batch = padded("left")
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    found = model.generate(**batch, **options)
    assert found.shape[0] == 8
    assert torch.equal(found[::2, : batch["input_ids"].shape[1]], batch["input_ids"])
    uncached = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(found, uncached)


def test_lengths_count_what_is_returned_and_a_dict_holds_it() -> None:
    """As HIVE's: prompts and new tokens, whatever the images take."""
    model = tiny_cascaded()
    batch, options = padded("left"), {"do_sample": False, "pad_token_id": 0}
    whole = model.generate(**batch, **options, max_new_tokens=3, eos_token_id=None)
    assert whole.shape[1] == max(LENGTHS) + 3
    assert torch.equal(model.generate(**batch, **options, max_length=max(LENGTHS) + 3, eos_token_id=None), whole)
    ends = sorted(set(whole[:, max(LENGTHS)].tolist()))
    lengths = {"min_length": max(LENGTHS) + 3, "max_length": max(LENGTHS) + 5, "eos_token_id": ends}
    held = model.generate(**batch, **options, **lengths)
    assert not torch.isin(held[:, max(LENGTHS) : max(LENGTHS) + 3], torch.tensor(ends)).any()
    found = model.generate(**batch, **options, max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True)
    assert torch.equal(found.sequences, whole)


def test_images_reach_the_texts_after_them_alone() -> None:
    """Another picture moves the logits from its offset on, in its own sample; the text's own ones stay to the bit."""
    model = tiny_cascaded()
    inputs = packed()
    with torch.no_grad():
        before = model(**inputs).logits
        inputs["pixel_values"][2] += 1.0  # the second image of the third sample, at offset 5
        moved = (model(**inputs).logits != before).any(dim=1)
    start = sum(LENGTHS[:2])
    assert moved.nonzero()[:, 0].tolist() == list(range(start + 5, start + 8))


def test_dummy_image_gets_a_zero_gradient() -> None:
    """A batch without images carries one that no token sees: all modules are called, and nothing comes of it."""
    model = tiny_cascaded().train()
    model.requires_grad_(True)
    ids = random_tokens(5)
    loss = model(ids, labels=ids, text_lengths=[5], image_offsets=[[5]], pixel_values=random_images(1)).loss
    loss.backward()
    alone = model(ids, labels=ids, text_lengths=[5]).loss
    assert torch.equal(loss, alone)
    for parameter in model.projector.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_first_answer_token_is_predicted_from_the_image() -> None:
    """A supervised token right after an image counts; the first token of a text without one has nothing before it."""
    model = tiny_cascaded()
    ids, labels = random_tokens(4), torch.full((4,), IGNORE_INDEX)
    labels[0] = ids[0]
    pixels = random_images(1)
    with torch.no_grad():
        seen = model(ids, labels=labels, text_lengths=[4], image_offsets=[[0]], pixel_values=pixels).loss
        unseen = model(ids, labels=labels, text_lengths=[4]).loss
    assert seen > 0
    assert unseen == 0


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_cascaded().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = packed()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("vision_encoder.") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_backends_agree(backend: str) -> None:
    with torch.no_grad():
        found = tiny_cascaded(attention_backend=backend)(**packed()).logits
        torch.testing.assert_close(found, tiny_cascaded()(**packed()).logits, rtol=1e-4, atol=1e-5)


def test_transformers_does_not_look_for_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our attention is told where they begin; transformers 5 would have the host wait for the GPU to find them."""

    def look(*_: object) -> None:
        raise AssertionError("it looks")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    with torch.no_grad():
        tiny_cascaded()(**packed())
        tiny_cascaded()(**packed(), labels=torch.cat(texts()))
        plain = tiny_cascaded()
        plain.language_model.set_attn_implementation("eager")  # needs what it finds
        with pytest.raises(AssertionError, match="it looks"):
            plain(**packed())


def test_saved_folder_comes_back_and_another_tower_is_refused(tmp_path: Path) -> None:
    model = tiny_cascaded("qwen2", "clip", feature_block=2)
    model.language_model.generation_config.repetition_penalty = 3.0
    with torch.no_grad():
        next(model.vision_encoder.parameters()).add_(1.0)  # as training does
    model.save_pretrained(tmp_path)
    again = load_any(tmp_path)
    assert isinstance(again, CascadedForCausalLM)
    assert again.last_vision_block == 2
    assert again.language_model.generation_config.repetition_penalty == 3.0
    with torch.no_grad():
        torch.testing.assert_close(again(**packed()).logits, model(**packed()).logits, rtol=0, atol=0)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "vision_tower" in name and name.endswith("fc1.weight"))
    weights[name] += 0.1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HiveError, match=r"the vision encoder in it has SHA-256 \w+, but it was saved with"):
        load_any(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bf16_keeps_rotary_frequencies(family: str) -> None:
    """DeepSpeed casts the whole module; frequencies in bf16 would turn Qwen2's token 700 by 0.66 radians."""
    exact, model = tiny_cascaded(family), tiny_cascaded(family).bfloat16()
    kept, cast = ({n: b for n, b in part.named_buffers() if n.endswith("inv_freq")} for part in (exact, model))
    assert kept
    for name, inv_freq in kept.items():
        assert torch.equal(cast[name], inv_freq), name
    assert model.dtype == torch.bfloat16
    inputs = packed()
    with torch.no_grad():
        found = model(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}).logits
        torch.testing.assert_close(found.float(), exact(**inputs).logits, rtol=0.05, atol=0.05)


def test_images_of_any_size() -> None:
    """SigLIP2 of variable resolution: a wide and a small image, packed as alone."""
    model = tiny_cascaded(vision="siglip2")
    pixels = torch.randn(2, 16, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
    shapes = torch.tensor([[2, 8], [3, 2]])
    mask = (torch.arange(16) < shapes.prod(dim=1)[:, None]).long()
    ids = random_tokens(9)
    with torch.no_grad():
        together = model(
            ids,
            text_lengths=[5, 4],
            image_offsets=[[1], [0]],
            pixel_values=pixels,
            pixel_attention_mask=mask,
            spatial_shapes=shapes,
        ).logits
        alone = [
            model(
                text,
                text_lengths=[len(text)],
                image_offsets=[[offset]],
                pixel_values=pixels[index, None],
                pixel_attention_mask=mask[index, None],
                spatial_shapes=shapes[index, None],
            ).logits
            for index, (text, offset) in enumerate(zip(ids.split([5, 4]), (1, 0), strict=True))
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_offsets": [[0, 1, 2, 3]]}, "for each of the 4 rows"),
        ({"image_offsets": None}, "for each of the 4 rows"),
        ({"image_offsets": [[2], [], [5, 0], [4]]}, r"of row 2 are \[5, 0\]; they must be in ascending order"),
        ({"pixel_values": None}, "pixel_values is None"),
    ],
)
def test_wrong_batches_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_cascaded()(**{**packed(), **changes})


@pytest.mark.parametrize("block", [5, 0, -5])
def test_block_out_of_range_is_named(block: int) -> None:
    said = f"feature_block is {block}, but the encoder has 4 blocks; expected 1 to 4, or -1 to -4"
    with pytest.raises(HiveError, match=said):
        tiny_cascaded(feature_block=block)
