"""Block features equal Hugging Face's hidden states, for every family."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_models import random_images, tiny_cascaded, tiny_encoder, tiny_hive

from hive_ds.errors import HiveError
from hive_ds.model.vision import (
    FAMILIES,
    block_runner,
    encode_images,
    run_blocks,
    running_blocks,
    vision_blocks,
    vision_config_of,
)

PREFIX = {"siglip": 0, "clip": 1, "dinov2": 1, "dinov2_with_registers": 4, "dinov3": 4, "aimv2": 0}


@pytest.mark.parametrize("family", PREFIX)
def test_features_equal_hidden_states(family):
    encoder, images = tiny_encoder(family), random_images(3)
    with torch.no_grad():
        hidden_states = encoder(images, output_hidden_states=True).hidden_states
    features = encode_images(encoder, (1, 2, 4), images)
    assert features.grids == [(4, 4)] * 3
    assert sorted(features.by_block) == [1, 2, 4]
    for block, feature in features.by_block.items():
        expected = hidden_states[block][:, PREFIX[family] :].flatten(0, 1)
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)


def test_variable_resolution_equals_hidden_states_and_single_images():
    """SigLIP2's padded patches leave no trace: a mixed batch equals its images one by one."""
    encoder = tiny_encoder("siglip2")
    shapes = torch.tensor([[4, 4], [2, 5], [3, 1]])
    counts = shapes.prod(dim=1)
    mask = (torch.arange(16) < counts[:, None]).long()
    pixels = torch.randn(3, 16, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
    both = {"pixel_attention_mask": mask, "spatial_shapes": shapes}
    features = encode_images(encoder, (2, 3), pixels, **both)
    assert features.grids == [(4, 4), (2, 5), (3, 1)]
    with torch.no_grad():
        stock = encoder(pixels, mask, shapes, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features.by_block[3], stock[3][mask.bool()], rtol=1e-5, atol=1e-5)
    for image in range(3):
        alone = encode_images(
            encoder,
            (2, 3),
            pixels[image : image + 1],
            **{name: value[image : image + 1] for name, value in both.items()},
        )
        start = int(counts[:image].sum())
        together = features.by_block[3][start : start + int(counts[image])]
        torch.testing.assert_close(together, alone.by_block[3], rtol=1e-5, atol=1e-5)


def test_dinov3_positions_are_fp32_and_never_drawn() -> None:
    """A model cast to bf16 has bf16 frequencies, and stock DINOv3 scales positions at random in training."""
    encoder = tiny_encoder("dinov3")
    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(images).last_hidden_state[:, PREFIX["dinov3"] :].flatten(0, 1)
    encoder.train().rope_embeddings.bfloat16()
    features = encode_images(encoder, (4,), images)
    assert features.grids == [(8, 4)] * 2
    torch.testing.assert_close(encoder.norm(features.by_block[4]), expected, rtol=1e-5, atol=1e-5)


def test_stops_after_the_last_block_that_is_needed():
    encoder, called = tiny_encoder(), []
    for number, block in enumerate(vision_blocks(encoder), start=1):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    encode_images(encoder, (1, 3), random_images(1))
    assert called == [1, 2, 3]


def test_records_gradients_only_if_a_parameter_trains():
    encoder, images = tiny_encoder(), random_images(1)
    assert encode_images(encoder, (2,), images).by_block[2].requires_grad
    encoder.requires_grad_(False)
    assert not encode_images(encoder, (2,), images).by_block[2].requires_grad


def test_another_runner_runs_the_blocks_inside_and_no_longer() -> None:
    encoder, compiled, marked = tiny_encoder(), Mock(), Mock()
    for before in (run_blocks, compiled):
        if before is compiled:
            encoder.run_blocks = compiled
        with running_blocks(encoder, marked):
            assert block_runner(encoder) is marked
        assert block_runner(encoder) is before


@pytest.mark.parametrize(("height", "width"), [(32, 36), (36, 32)])
@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_an_image_that_patches_do_not_tile_is_named(family, height, width):
    said = rf"pixel_values are {height} x {width} pixels; {family}\w* expects multiples of 8"
    with pytest.raises(HiveError, match=said):
        encode_images(tiny_encoder(family), [1], torch.zeros(1, 3, height, width))


def test_wrong_image_size_names_both_sizes():
    with pytest.raises(HiveError, match=r"48 x 48 pixels; siglip_vision_model expects 32 x 32"):
        encode_images(tiny_encoder(), (1,), torch.zeros(1, 3, 48, 48))


def test_unsupported_family_is_named():
    import transformers

    with pytest.raises(HiveError, match="'vit' is not supported"):
        vision_config_of(transformers.ViTConfig())
    assert set(FAMILIES) >= {"siglip_vision_model", "siglip2_vision_model", "clip_vision_model", "dinov2"}


@pytest.mark.parametrize("make", [tiny_hive, tiny_cascaded])
def test_a_frozen_encoder_uses_no_dropout(make: Any) -> None:
    model = make()
    blocks = vision_blocks(model.vision_encoder)
    for frozen in (True, False):
        model.vision_encoder.requires_grad_(not frozen)
        model.train()
        assert {block.training for block in blocks} == {not frozen}
        assert model.language_model.training
