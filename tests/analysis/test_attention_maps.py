"""Attention maps are the probabilities that the layers attend with."""

from __future__ import annotations

import itertools

import pytest
import torch
from scene_models import save_scene_model
from tiny_models import random_images, random_tokens, tiny_cascaded, tiny_hive
from transformers import LlavaForConditionalGeneration

from hive_ds.analysis.attention_maps import attention_maps, token_attention_maps
from hive_ds.analysis.maps import AttentionMaps, LayerMaps
from hive_ds.data.scenes_samples import question_samples
from hive_ds.errors import HiveError
from hive_ds.kernels import finish_keys
from hive_ds.model import attention as attention_module

LENGTH, OFFSETS = 9, [0, 3, 3, 9]
"""Images in front, twice in mid-text, and one that no token sees."""
CLOSE = {"rtol": 0, "atol": 1e-5}


def maps_and_calls(model, monkeypatch, *, offsets=OFFSETS, head=None, **images) -> tuple[AttentionMaps, dict]:
    """Maps of random tokens, and what each routed layer's attention was given and returned meanwhile."""
    calls, call = {}, attention_module.hierarchical_attention
    layers = itertools.cycle(range(len(model.language_model.model.layers)))

    def spy(*arguments, **keywords):
        calls[next(layers)] = (arguments, keywords, out := call(*arguments, **keywords))
        return out

    monkeypatch.setattr(attention_module, "hierarchical_attention", spy)
    maps = token_attention_maps(model, random_tokens(LENGTH)[None], offsets, images, head=head)
    return maps, {layer: calls[layer] for layer in model.routes.blocks_by_layer}


def dense_softmax(arguments, keywords) -> torch.Tensor:
    """(H, T, S) over text and image keys, straight from the contract."""
    q, k, _, image_k, _, layout = arguments
    norms = {name: (keywords[f"{name}_norm_weight"], keywords["norm_eps"], keywords["qk_norm"]) for name in "qk"}
    q = finish_keys(q, *norms["q"], keywords["cos"], keywords["sin"])
    keys = [finish_keys(k, *norms["k"], keywords["cos"], keywords["sin"])]
    keys.append(finish_keys(image_k, *norms["k"], keywords["image_cos"], keywords["image_sin"]))
    token = torch.arange(LENGTH)[:, None]
    visible = [token >= torch.arange(LENGTH)]
    for length, offset in zip(layout.image_lengths[0], layout.image_offsets[0], strict=True):
        visible.append((token >= offset).expand(-1, length))
    keys_SHK = torch.cat(keys).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("thk,shk->hts", q, keys_SHK) * keywords["softmax_scale"]
    return scores.masked_fill(~torch.cat(visible, dim=1), float("-inf")).softmax(-1)


def all_keys(layer: LayerMaps) -> torch.Tensor:
    """(T, S) probabilities in the order of the op's keys."""
    return torch.cat([layer.text_TT, *(image.flatten(1) for image in layer.images)], dim=1)


@pytest.mark.parametrize("image_kv", ["shared", "own"])
@pytest.mark.parametrize("rope", ["2d", "1d"])
@pytest.mark.parametrize(
    ("language", "qk_norm"), [("llama", "none"), ("llama", "pre_rope"), ("qwen2", "post_rope"), ("qwen3", "pre_rope")]
)
def test_maps_are_a_dense_softmax(language, qk_norm, rope, image_kv, monkeypatch):
    """Mean and single heads, several blocks to one layer; with the values they give what the layer put out."""
    routes = {"vision_blocks": (3, 1, 2), "language_layers": (1, 1, 4)}
    model = tiny_hive(language, qk_norm=qk_norm, rope=rope, image_kv=image_kv, **routes)
    pixels = random_images(len(OFFSETS))
    maps, calls = maps_and_calls(model, monkeypatch, pixel_values=pixels)
    assert [(one.layer, one.blocks) for one in maps.layers] == [(1, (3, 1)), (4, (2,))]
    assert maps.tokens == random_tokens(LENGTH).tolist()
    for one in maps.layers:
        arguments, keywords, _ = calls[one.layer]
        torch.testing.assert_close(all_keys(one), dense_softmax(arguments, keywords).mean(0), **CLOSE)
        torch.testing.assert_close(all_keys(one).sum(1), torch.ones(LENGTH), **CLOSE)
        for image, offset in zip(one.images, OFFSETS, strict=True):
            assert image.shape == (LENGTH, len(one.blocks), 4, 4)
            assert image[:offset].sum() == 0
            assert (image[offset:] > 0).all()
    for head in (0, 3, 5):
        single, calls = maps_and_calls(model, monkeypatch, head=head, pixel_values=pixels)
        for one in single.layers:
            (_, _, v, _, image_v, _), _, out = calls[one.layer]
            values = torch.cat([v, image_v])[:, head // 3]
            torch.testing.assert_close(all_keys(one) @ values, out[:, head], **CLOSE)


def test_images_of_several_sizes(monkeypatch):
    """Variable resolution: each image has a grid of its own."""
    model = tiny_hive(vision="siglip2", vision_blocks=(1, 2), language_layers=(2, 2))
    shapes = torch.tensor([[2, 3], [4, 2]])
    pixels = torch.randn(2, 16, 8 * 8 * 3, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16) < shapes.prod(1)[:, None]
    images = {"pixel_values": pixels, "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}
    maps, calls = maps_and_calls(model, monkeypatch, offsets=[1, 4], **images)
    (one,) = maps.layers
    assert [image.shape[1:] for image in one.images] == [(2, 2, 3), (2, 4, 2)]
    assert one.on_patches(1).equal(one.images[1].sum(1))
    torch.testing.assert_close(all_keys(one), dense_softmax(*calls[2][:2]).mean(0), **CLOSE)


def test_straight_from_a_folder_and_a_file(tmp_path):
    """Rows sum to 1 in bf16 too, where the op has rounded; a text without an image has no map."""
    model, processor = save_scene_model(tmp_path)
    (sample,) = question_samples(0, "questions", 1, 64)
    (tmp_path / "picture.png").write_bytes(sample.images[0])
    text = processor.apply_chat_template([{"role": "user", "content": "hm? <image>red?"}]) + "red circle"
    for dtype in (torch.float32, torch.bfloat16):
        maps = attention_maps(model.to(dtype), processor, text, tmp_path / "picture.png")
        assert processor.decode(maps.tokens, skip_special_tokens=False) == text.replace("<image>", "")
        for one in maps.layers:
            torch.testing.assert_close(all_keys(one).sum(1), torch.ones(len(maps.tokens)), **CLOSE)
            offset = processor(text, tmp_path / "picture.png")["image_offsets"][0][0]
            assert (one.on_patches(0).sum((1, 2)) > 0).tolist() == [t >= offset for t in range(len(maps.tokens))]
    with pytest.raises(HiveError, match="attention head 6: expected 0 to 5"):
        attention_maps(model, processor, text, tmp_path / "picture.png", head=6)
    with pytest.raises(HiveError, match="text without an image"):
        attention_maps(model, processor, "no picture", [])


@pytest.mark.parametrize("language", ["llama", "qwen3"])
def test_maps_of_a_cascaded_model_are_those_of_stock_transformers(language, tmp_path):
    """Text tokens on image tokens, at every layer; an image after the text is not in the sequence."""
    model = tiny_cascaded(language)
    offsets, pixels, text = [0, 3], random_images(2), random_tokens(LENGTH)
    model.save_pretrained(tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    patches = torch.full((16,), model.config.image_token_index)
    ids = torch.cat([patches, text[:3], patches, text[3:]])
    attentions = stock(ids[None], pixel_values=pixels, output_attentions=True).attentions
    places = (ids != model.config.image_token_index).nonzero()[:, 0]
    for head in (None, 1):
        maps = token_attention_maps(
            model, text[None], [*offsets, LENGTH], {"pixel_values": random_images(3)}, head=head
        )
        assert [one.layer for one in maps.layers] == list(range(5))
        for one, weights in zip(maps.layers, attentions, strict=True):
            expected = (weights[0].mean(0) if head is None else weights[0, head])[places]
            torch.testing.assert_close(one.text_TT, expected[:, places], **CLOSE)
            torch.testing.assert_close(one.on_patches(0).flatten(1), expected[:, :16], **CLOSE)
            torch.testing.assert_close(one.on_patches(1).flatten(1), expected[:, 19:35], **CLOSE)
            torch.testing.assert_close(all_keys(one).sum(1), torch.ones(LENGTH), **CLOSE)
            assert one.images[2].sum() == 0
    assert model.language_model.config._attn_implementation == "hive"
