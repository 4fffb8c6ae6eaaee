"""Gradients at the encoder's blocks are those of plain autograd through the reference attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_images, random_tokens, tiny_cascaded, tiny_hive
from torch import Tensor

from hive_ds.analysis.block_gradients import block_gradients, watched_gradients
from hive_ds.constants import IGNORE_INDEX
from hive_ds.model.inputs import PromptImages
from hive_ds.model.interleaving import Interleaving
from hive_ds.model.vision import VisionFeatures, vision_blocks

LENGTHS, OFFSETS = [7, 5], [[0, 3], [2]]
CLOSE = {"rtol": 1e-4, "atol": 1e-7}


def inputs_of(pixels: Tensor) -> dict[str, Any]:
    ids = random_tokens(sum(LENGTHS))
    labels = ids.clone()
    labels[:3] = IGNORE_INDEX
    labels[LENGTHS[0]] = IGNORE_INDEX
    packed = {"text_lengths": LENGTHS, "image_offsets": OFFSETS}
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, **packed}


def by_hand(model: Any, inputs: dict[str, Any]) -> dict[int, Tensor]:
    """The encoder's blocks one after another, each output a leaf of its own graph, and the chain rule between them."""
    encoder = getattr(model.vision_encoder, "vision_model", model.vision_encoder)
    blocks, hidden, steps = vision_blocks(model.vision_encoder), encoder.embeddings(inputs["pixel_values"]), []
    for block in blocks[: max(model.feature_blocks)]:
        start = hidden.detach().requires_grad_()
        out = block(start, None)
        steps.append((start, out[0] if isinstance(out, tuple) else out))
        hidden = steps[-1][1]
    leaves = [out.detach().requires_grad_() for _, out in steps]
    loss = loss_from(model, {number: leaf for number, leaf in enumerate(leaves, start=1)}, inputs)
    direct = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients, above = {}, torch.zeros_like(hidden)
    for number in range(len(steps), 0, -1):
        start, out = steps[number - 1]
        gradients[number] = above if direct[number - 1] is None else above + direct[number - 1]
        (above,) = torch.autograd.grad(out, start, gradients[number])
    return gradients


def loss_from(model: Any, outputs: dict[int, Tensor], inputs: dict[str, Any]) -> Tensor:
    """The loss of the text, given what the blocks put out."""
    features = {block: outputs[block].flatten(0, 1) for block in model.feature_blocks}
    grids = [(4, 4)] * len(inputs["pixel_values"])
    text = {"input_ids": inputs["input_ids"], "labels": inputs["labels"], "text_lengths": LENGTHS}
    if hasattr(model, "routes"):
        return model(**text, prompt_images=PromptImages.build(VisionFeatures(features, grids), OFFSETS)).loss
    places = Interleaving.build(LENGTHS, [[16, 16], [16]], OFFSETS, keep_last=False)
    embedded = model.language_model.get_input_embeddings()(inputs["input_ids"])
    states = torch.cat([embedded, model.projector(features[model.last_vision_block])])[places.source_S]
    arguments = {"position_ids": places.positions_S[None], "use_cache": False}
    logits = model.language_model(inputs_embeds=states[None], **arguments).logits[0]
    counted = inputs["labels"] != IGNORE_INDEX
    return F.cross_entropy(logits[places.text_T[counted] - 1], inputs["labels"][counted])


MODELS = {
    "hive": lambda: tiny_hive(attention_backend="reference", text_attention_backend="reference"),
    "several blocks to a layer": lambda: tiny_hive(
        vision_blocks=(3, 1, 2), language_layers=(1, 1, 4), attention_backend="reference"
    ),
    "last": lambda: tiny_hive(vision_blocks=(4, 4), language_layers=(1, 3), attention_backend="reference"),
    "cascaded": tiny_cascaded,
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_autograd_through_the_reference(kind: str, frozen: bool) -> None:
    """A frozen encoder has them, too; the tail behind the last block that is read has none; no parameter gets one."""
    model, inputs = MODELS[kind](), inputs_of(random_images(3))
    expected = by_hand(model, inputs)
    model.vision_encoder.requires_grad_(not frozen)
    found = block_gradients(model, inputs)
    assert sorted(found.by_block) == sorted(expected) == list(range(1, max(model.feature_blocks) + 1))
    maps, norms = [found.on_patches(image) for image in range(3)], found.norms()
    for block, gradient in expected.items():
        torch.testing.assert_close(found.by_block[block], gradient.flatten(0, 1), **CLOSE)
        assert norms[block] == pytest.approx(float(gradient.norm()), rel=1e-4)
        for image in range(3):
            torch.testing.assert_close(maps[image][block], gradient[image].norm(dim=1).reshape(4, 4), **CLOSE)
    assert found.loss == pytest.approx(model(**inputs).loss.item())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not inputs["pixel_values"].requires_grad


@pytest.mark.parametrize("vision", ["clip", "dinov2_with_registers", "dinov3", "siglip2"])
def test_patches_alone_count(vision: str) -> None:
    """CLS, registers and padding are left out; images may have grids of their own."""
    model = tiny_hive(vision=vision)
    inputs = inputs_of(random_images(3))
    if vision == "siglip2":
        shapes = torch.tensor([[2, 3], [4, 2], [4, 4]])
        inputs["pixel_values"] = torch.randn(3, 16, 8 * 8 * 3, generator=torch.Generator().manual_seed(0))
        mask = torch.arange(16) < shapes.prod(1)[:, None]
        inputs |= {"pixel_attention_mask": mask.int(), "spatial_shapes": shapes}
    found = block_gradients(model, inputs)
    sizes = [rows * columns for rows, columns in found.grids]
    assert sizes == ([6, 8, 16] if vision == "siglip2" else [16] * 3)
    assert found.by_block[1].shape == (sum(sizes), 32)
    assert [found.on_patches(image)[1].shape for image in range(3)] == found.grids
    with watched_gradients(model) as squares:
        model(**inputs).loss.backward()
    for block, norm in found.norms().items():
        assert float(squares[block]) ** 0.5 == pytest.approx(norm, rel=1e-5)


def test_a_text_that_sees_no_image_gives_none() -> None:
    model, inputs = tiny_hive(), inputs_of(random_images(3))
    inputs["image_offsets"] = [[7, 7], [5]]
    assert all(norm == 0 for norm in block_gradients(model, inputs).norms().values())
