"""The properties that the attention contract demands of the whole model (docs/attention.md), on tiny random models."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import random_images, random_tokens, tiny_encoder, tiny_hive, tiny_language_model

from hive_ds.constants import IGNORE_INDEX
from hive_ds.errors import HiveError
from hive_ds.model.attention import HiveAttention
from hive_ds.model.cache import HiveCache
from hive_ds.model.vision import vision_blocks

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

LENGTHS, OFFSETS = [7, 4, 9], [[0], [], [2, 6]]
"""Three samples: an image in front, none, and two in mid-text."""


def packed(offsets=OFFSETS):
    images = sum(len(one) for one in offsets)
    return {
        "input_ids": random_tokens(sum(LENGTHS)),
        "text_lengths": LENGTHS,
        "image_offsets": offsets,
        "pixel_values": random_images(images) if images else None,
    }


def padded(batch, side):
    """The packed batch as rows of 9 slots, padded on one side; also the slots that hold tokens."""
    rows = batch["input_ids"].split(LENGTHS)
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        slots = slice(9 - len(tokens), 9) if side == "left" else slice(0, len(tokens))
        ids[row, slots], mask[row, slots] = tokens, 1
    rest = {name: batch[name] for name in ("image_offsets", "pixel_values")}
    return {"input_ids": ids, "attention_mask": mask, **rest}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_images_equals_the_base_llm(family):
    """Routed layers with image projections of their own change nothing while there is no image."""
    model = tiny_hive(family, qk_norm="none", image_kv="own")
    ids = random_tokens(22).view(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_language_model(family)(ids).logits, **CLOSE)


def test_only_routed_layers_get_parts_of_their_own():
    layers = tiny_hive(qk_norm="post_rope", image_kv="own").language_model.model.layers
    for part in ("q_norm", "k_norm", "image_k_proj", "image_v_proj"):
        assert [hasattr(layer.self_attn, part) for layer in layers] == [index in (1, 3) for index in range(len(layers))]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_parts_of_its_own_are_like_the_llms(family):
    """In dtype, bias and device; the norm has the epsilon asked for, and its weights are named to ZeRO-3."""
    attention = tiny_language_model(family).model.layers[0].self_attn.to("meta", torch.bfloat16)
    options = {"routed": True, "image_kv": "own", "qk_norm": "post_rope", "eps": 0.3, "backend": "auto"}
    built = HiveAttention(attention, 0, **options)
    for own, llms in ((built.image_k_proj, attention.k_proj), (built.image_v_proj, attention.v_proj)):
        described = [(name, x.shape, x.dtype, x.device) for name, x in own.named_parameters()]
        assert described == [(name, x.shape, x.dtype, x.device) for name, x in llms.named_parameters()]
    assert (built.q_norm.variance_epsilon, built.k_norm.variance_epsilon) == (0.3, 0.3)
    assert [id(x) for x in built.external_parameters()] == [id(built.q_norm.weight), id(built.k_norm.weight)]
    assert HiveAttention(attention, 0, **{**options, "qk_norm": "none"}).external_parameters() == []


@pytest.mark.parametrize("rope", ["2d", "1d"])
@pytest.mark.parametrize("qk_norm", ["none", "pre_rope", "post_rope"])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_packed_equals_single_equals_padded(family, qk_norm, rope):
    model = tiny_hive(family, qk_norm=qk_norm, rope=rope, image_kv="own")
    batch = packed()
    with torch.no_grad():
        together = model(**batch).logits.split(LENGTHS)
        images = iter(batch["pixel_values"])
        for row, tokens in enumerate(batch["input_ids"].split(LENGTHS)):
            own = [next(images) for _ in OFFSETS[row]]
            alone = model(tokens[None], image_offsets=[OFFSETS[row]], pixel_values=torch.stack(own) if own else None)
            torch.testing.assert_close(together[row], alone.logits[0], **CLOSE)
        for side in ("left", "right"):
            rows = padded(batch, side)
            logits = model(**rows).logits
            torch.testing.assert_close(logits[rows["attention_mask"].bool()], torch.cat(together), **CLOSE)


def test_images_reach_later_tokens_and_no_earlier_ones():
    """Perturbed pixels leave the logits before the image bit for bit unchanged (nothing leaks backwards)."""
    model, batch = tiny_hive(), packed()
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][2] += 1.0  # the image at offset 6 of the third sample
    with torch.no_grad():
        before, after = model(**batch).logits, model(**changed).logits
    first_seer = LENGTHS[0] + LENGTHS[1] + 6
    assert torch.equal(before[:first_seer], after[:first_seer])
    assert (before[first_seer:] - after[first_seer:]).abs().amax(dim=1).min() > 1e-4


def test_gradients_of_earlier_tokens_do_not_reach_an_image():
    model, batch = tiny_hive(), packed()
    pixels = batch["pixel_values"].requires_grad_()
    logits = model(**batch).logits
    logits[: LENGTHS[0] + LENGTHS[1] + 6].sum().backward()
    assert pixels.grad[2].abs().max() == 0
    assert pixels.grad[:2].abs().amax(dim=(1, 2, 3)).min() > 0


def test_an_image_at_the_end_equals_no_image_and_gets_zero_gradients():
    """The dummy image of a text-only batch: every module runs, nothing changes, no gradient is None."""
    model = tiny_hive(image_kv="own")
    labels = random_tokens(sum(LENGTHS))
    plain = model(**packed([[], [], []]), labels=labels)
    dummy = model(**packed([[], [], [9]]), labels=labels)
    torch.testing.assert_close(dummy.loss, plain.loss)
    dummy.loss.backward()
    for name, parameter in model.named_parameters():
        if "projectors" in name or "image_" in name or "vision_encoder.vision_model.encoder.layers.2" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_cached_equals_chunked_equals_one_pass(family):
    model = tiny_hive(family, qk_norm="pre_rope", image_kv="own", vision_blocks=(3, 1, 2), language_layers=(1, 1, 4))
    for layer in model.language_model.model.layers:  # a scale and an epsilon that no default hides
        layer.self_attn.softmax_scale = 0.4
        if layer.self_attn.qk_norm != "none":
            layer.self_attn.q_norm.variance_epsilon = 0.3
    tokens = random_tokens(60).view(3, 20)  # a cache has room for 16 at first
    offsets = [[0], [2, 6], []]
    images = {"image_offsets": offsets, "pixel_values": random_images(3)}
    with torch.no_grad():
        whole = model(tokens, **images).logits
        for chunks in ([1] * 20, [4, 3, 13], [18, 2]):
            cache, pieces = None, []
            for piece in tokens.split(chunks, dim=1):
                output = model(piece, past_key_values=cache, use_cache=True, **(images if cache is None else {}))
                cache = output.past_key_values
                pieces.append(output.logits)
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)
        with pytest.raises(ValueError, match="give images in the first call only"):
            model(tokens[:, :1], past_key_values=cache, use_cache=True, **images)


@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize(
    "how", [{"num_beams": 1}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}]
)
def test_generate_is_the_same_with_and_without_cache(family, how):
    model = tiny_hive(family)
    rows = padded(packed(), "left")
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        answers.append(model.generate(**rows, max_new_tokens=6, use_cache=use_cache, **{"do_sample": False, **how}))
    assert answers[0].shape[1] > 9
    assert torch.equal(*answers)


def test_generate_batched_equals_one_by_one():
    """Also where every row is padded, to a width that none of them has."""
    model, batch = tiny_hive("qwen2"), packed()
    rows = padded(batch, "left")
    for name in ("input_ids", "attention_mask"):
        rows[name] = torch.nn.functional.pad(rows[name], (2, 0))
    together = model.generate(**rows, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, 11:]
    images = iter(batch["pixel_values"])
    for row, tokens in enumerate(batch["input_ids"].split(LENGTHS)):
        own = [next(images) for _ in OFFSETS[row]]
        pixels = torch.stack(own) if own else None
        alone = model.generate(
            tokens[None],
            image_offsets=[OFFSETS[row]],
            pixel_values=pixels,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
        )
        assert torch.equal(together[row], alone[0, len(tokens) :])


def test_generate_refuses_prompts_padded_on_the_right():
    """Their next tokens would come of the padding."""
    with pytest.raises(ValueError, match="prompt 0 ends with padding; prompts to continue must be padded on the left"):
        tiny_hive().generate(**padded(packed(), "right"), max_new_tokens=1)


def test_generate_warns_of_an_image_that_the_first_new_token_cannot_see():
    model = tiny_hive()
    for offsets in ([4], [0, 4]):
        images = {"image_offsets": [offsets], "pixel_values": random_images(len(offsets))}
        with pytest.warns(UserWarning, match="prompt 0 ends with an image"):
            model.generate(random_tokens(4)[None], **images, max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(random_tokens(4)[None], image_offsets=[[3]], pixel_values=random_images(1), max_new_tokens=1)
    rows = {"input_ids": random_tokens(8).view(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])}
    with pytest.warns(UserWarning, match=r"prompt 1 ends with an image \(media offset 3, 3 tokens\)"):
        model.generate(**rows, image_offsets=[[3], [3]], pixel_values=random_images(2), max_new_tokens=1)


def test_a_step_reads_what_the_cache_does_not_hold():
    """One token at least: under ZeRO-3 a finished rank calls the model until all have finished."""
    tokens = torch.arange(8).view(2, 4)
    for held, read in ((0, tokens), (1, tokens[:, 1:]), (3, tokens[:, 3:]), (4, tokens[:, 3:]), (6, tokens[:, 3:])):
        step = tiny_hive().prepare_inputs_for_generation(tokens, HiveCache(padded_length=held), logits_to_keep=1)
        assert torch.equal(step["input_ids"], read)
        assert step["logits_to_keep"] == 1


def test_order_of_blocks_at_one_layer_does_not_matter_but_their_features_do():
    """Keys of several blocks at one layer join one softmax; the advance is counted once."""
    forward, backward = (tiny_hive(vision_blocks=order, language_layers=(2, 2)) for order in ((1, 3), (3, 1)))
    backward.load_state_dict(forward.state_dict())
    batch = packed()
    with torch.no_grad():
        torch.testing.assert_close(forward(**batch).logits, backward(**batch).logits, **CLOSE)
        one = tiny_hive(vision_blocks=(1,), language_layers=(2,))
        assert (one(**batch).logits - forward(**batch).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_gradient_reaches_every_routed_block_with_and_without_checkpointing(family):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_hive(family, image_kv="own", vision_blocks=(1, 2, 3), language_layers=(0, 2, 4)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**packed(), labels=random_tokens(sum(LENGTHS))).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)
    blocks = dict(vision_blocks(model.vision_encoder).named_parameters())
    for name, parameter in blocks.items():
        reached = parameter.grad is not None and parameter.grad.abs().max() > 0
        # A key bias shifts all scores of a query alike, so softmax gives it no gradient.
        assert reached == (not name.startswith("3.")) or "k_proj.bias" in name, name


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(HiveError, match="use_reentrant=True"):
        tiny_hive().gradient_checkpointing_enable({"use_reentrant": True})


def test_loss_counts_supervised_tokens_within_samples():
    """The packed loss equals cross-entropy by hand, and ignores labels that would cross from sample to sample."""
    model, batch = tiny_hive(), packed()
    labels = batch["input_ids"].clone()
    labels[2:5] = IGNORE_INDEX
    with torch.no_grad():
        logits = model(**batch).logits
        loss = model(**batch, labels=labels).loss
        halved = model(**batch, labels=labels, num_items_in_batch=34).loss
        rows = padded(batch, "left")
        padded_labels = torch.full_like(rows["input_ids"], IGNORE_INDEX)
        padded_labels[rows["attention_mask"].bool()] = labels
        from_padded = model(**rows, labels=padded_labels).loss
    starts = [0, 7, 11]
    predicted = [t for t in range(1, 20) if t not in starts and labels[t] != IGNORE_INDEX]
    by_hand = torch.nn.functional.cross_entropy(logits[[t - 1 for t in predicted]], labels[predicted])
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(from_padded, by_hand)
    torch.testing.assert_close(halved, by_hand * len(predicted) / 34)


def test_a_batch_without_supervised_tokens_has_a_finite_zero_loss():
    model = tiny_hive()
    loss = model(**packed(), labels=torch.full((20,), IGNORE_INDEX)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert model.projectors["block1_to_layer1"].fc1.weight.grad.abs().max() == 0


@pytest.mark.parametrize("vision", ["clip", "dinov2", "dinov2_with_registers", "dinov3", "aimv2"])
def test_other_encoders_join(vision):
    model = tiny_hive("llama", vision)
    with torch.no_grad():
        with_images, without = model(**packed()).logits, model(**packed([[], [], []])).logits
    assert (with_images - without)[:7].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_lengths": [7, 4]}, r"text_lengths is \[7, 4\]; with packed input_ids of 20 tokens"),
        ({"image_offsets": [[0], []]}, "for each of the 3 rows"),
        ({"image_offsets": [[0], [], [2]]}, "image_offsets lists 2 images; pixel_values holds 3"),
        ({"pixel_values": None}, "pixel_values is None"),
        ({"image_offsets": [[0], [], [6, 2]]}, "ascending order"),
        ({"image_offsets": [[8], [], [2, 6]]}, "offset"),
    ],
)
def test_wrong_batches_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_hive()(**{**packed(), **changes})


def test_an_unknown_way_to_number_patches_is_named():
    with pytest.raises(HiveError, match="rope is '3d'; it must be one of 2d, 1d"):
        tiny_hive(rope="3d")


def test_encoder_of_the_batch_is_stock():
    """The vision tower inside is the plain transformers model, weight for weight."""
    model, stock = tiny_hive(), tiny_encoder()
    assert type(model.vision_encoder) is type(stock)
    assert model.vision_encoder.state_dict().keys() == stock.state_dict().keys()
