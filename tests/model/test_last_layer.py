"""The last layer works for the tokens alone that the loss reads, and no number changes by it."""

from __future__ import annotations

import copy

import pytest
import torch
from test_hive import LENGTHS, packed
from tiny_models import random_tokens, tiny_hive

from hive_ds.constants import IGNORE_INDEX
from hive_ds.model.language import decoder

STARTS = (0, 7, 11)


@pytest.mark.parametrize("layers", [(0, 1), (1, 3)], ids=["plain last layer", "routed last layer"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_loss_and_gradients_equal_those_of_all_tokens(family, checkpointing, layers):
    model = tiny_hive(family, language_layers=layers, image_kv="own")
    batch, labels = packed(), random_tokens(sum(LENGTHS), seed=5)
    labels[[1, 2, 8, 9, 13, 14, 15]] = IGNORE_INDEX
    whole = copy.deepcopy(model)
    logits = whole(**batch).logits
    predicted = [t for t in range(20) if t not in STARTS and labels[t] != IGNORE_INDEX]
    expected = torch.nn.functional.cross_entropy(logits[[t - 1 for t in predicted]], labels[predicted])
    expected.backward()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    seen = []
    mlps = [layer.mlp for layer in decoder(model.language_model).layers]
    for mlp in (mlps[0], mlps[-1]):
        mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    loss = model(**batch, labels=labels).loss
    assert seen == [20, len(predicted)]
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for (name, found), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (found.grad is None) == (reference.grad is None), name
        if found.grad is not None:
            torch.testing.assert_close(found.grad, reference.grad, msg=lambda text, name=name: f"{name}: {text}")
