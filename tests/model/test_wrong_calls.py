"""Calls of the models that do not fit, from a script of one's own: what is wrong is named, with what was expected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import GREEDY, prompts, random_images, random_tokens, tiny_cascaded, tiny_hive, tiny_language_model
from transformers import GenerationConfig


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
@pytest.mark.parametrize(
    "offsets", [np.array([[1], [2]]), torch.tensor([[1], [2]]), ((1,), (2,)), [np.array([1]), torch.tensor([2])]]
)
@torch.no_grad()
def test_offsets_come_in_any_sequence_of_whole_numbers(make: Any, offsets: Any) -> None:
    model, ids, pixels = make(), random_tokens(18).view(2, 9), random_images(2)
    expected = model(ids, image_offsets=[[1], [2]], pixel_values=pixels).logits
    assert torch.equal(model(ids, image_offsets=offsets, pixel_values=pixels).logits, expected)
    listed = model.generate(ids, image_offsets=[[1], [2]], pixel_values=pixels, **GREEDY, max_new_tokens=2)
    found = model.generate(ids, image_offsets=offsets, pixel_values=pixels, **GREEDY, max_new_tokens=2)
    assert torch.equal(found, listed)
    with pytest.raises(ValueError, match="image_offsets lists images but pixel_values is None"):
        model(ids, image_offsets=offsets)


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_offsets": [[0], [-2, 5]]}, r"image_offsets of row 1 are \[-2, 5\]; expected whole numbers from 0"),
        ({"image_offsets": [[0.0], [2, 5]]}, r"image_offsets of row 0 are \[0.0\]; expected whole numbers from 0"),
        ({"image_offsets": [0, 2]}, "image_offsets of row 0 are 0; expected whole numbers from 0, one an image"),
        ({"image_offsets": [[0], None]}, "image_offsets of row 1 are None; expected whole numbers"),
        ({"attention_mask": torch.ones(2, 8)}, r"attention_mask is of shape \(2, 8\); expected \(2, 9\)"),
        ({"attention_mask": torch.ones(1, 9)}, r"attention_mask is of shape \(1, 9\); expected \(2, 9\)"),
        ({"attention_mask": torch.ones(9)}, r"attention_mask is of shape \(9,\); expected \(2, 9\)"),
        ({"labels": random_tokens(16).view(2, 8)}, r"labels are of shape \(2, 8\); expected \(2, 9\)"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(**{**prompts(), **changes})


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
def test_packed_labels_that_do_not_fit_are_named(make: Any) -> None:
    with pytest.raises(ValueError, match=r"labels are of shape \(1, 9\); expected \(9,\), that of input_ids"):
        make()(random_tokens(9), labels=random_tokens(9)[None], text_lengths=[9])


@pytest.mark.parametrize("vision", ["siglip", "siglip2", "clip", "dinov3"])
@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
@torch.no_grad()
def test_pixel_values_of_no_images_are_no_images(make: Any, vision: str) -> None:
    model, ids = make(vision=vision), random_tokens(18).view(2, 9)
    none = {"pixel_values": random_images(0)}
    if vision == "siglip2":
        none = {"pixel_values": torch.zeros(0, 16, 192), "spatial_shapes": torch.zeros(0, 2, dtype=torch.int64)}
    assert torch.equal(model(ids, image_offsets=[[], []], **none).logits, model(ids).logits)
    with pytest.raises(ValueError, match="image_offsets lists 1 images; pixel_values holds 0"):
        model(ids, image_offsets=[[], [3]], **none)


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
def test_prompts_that_cannot_be_continued_are_named(make: Any) -> None:
    model, ids = make(), random_tokens(9)
    for shape in ((0, 0), (0, 3)):
        with pytest.raises(ValueError, match=rf"input_ids is of shape \({shape[0]}, {shape[1]}\); expected \(prompts"):
            model.generate(torch.zeros(shape, dtype=torch.int64), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"input_ids is of shape \(9,\); expected \(prompts, tokens\)"):
        model.generate(ids, max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 0 is empty; expected"):
        model.generate(ids[None, :0], max_new_tokens=1)
    mask = torch.tensor([[1] * 3, [0] * 3, [1] * 3])
    with pytest.raises(ValueError, match=r"prompt 1 (is empty|ends with padding)"):
        model.generate(ids.view(3, 3), attention_mask=mask, max_new_tokens=1)


@torch.no_grad()
def test_a_cascaded_model_describes_an_image_without_a_word() -> None:
    model = tiny_cascaded()
    image = {"image_offsets": [[0]], "pixel_values": random_images(1)}
    assert model.generate(random_tokens(9)[None, :0], **image, **GREEDY, max_new_tokens=3).shape == (1, 3)


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("prompt_lookup_num_tokens", 2, "2"),
        ("prefill_chunk_size", 4, "4"),
        ("assistant_early_exit", 3, "3"),
        ("cache_implementation", "static", "'static'"),
    ],
)
def test_ways_to_generate_that_the_models_do_not_have_are_named(make: Any, name: str, value: Any, said: str) -> None:
    """As arguments and in a config; the cache of a cascaded model is its LLM's."""
    model, inputs = make(), prompts()
    if make is tiny_cascaded and name == "cache_implementation":
        assert model.generate(**inputs, **{name: value}, **GREEDY, max_new_tokens=2).shape == (2, 11)
        return
    expected = pytest.raises(
        ValueError, match=f"{name} is {said}; expected None: this model does not generate that way"
    )
    with expected:
        model.generate(**inputs, **{name: value}, max_new_tokens=2)
    config = GenerationConfig(max_new_tokens=2)
    setattr(config, name, value)
    with expected:
        model.generate(**inputs, generation_config=config)


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
def test_an_assistant_is_named(make: Any) -> None:
    with pytest.raises(ValueError, match="assistant_model is a LlamaForCausalLM; expected None"):
        make().generate(**prompts(), assistant_model=tiny_language_model(), max_new_tokens=2)
