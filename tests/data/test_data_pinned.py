"""What goes to a GPU waits in pinned memory, and reaches the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from hive_ds.data.batch import PackedBatch


def test_a_loader_pins_images_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The DataLoader's own function asks the batch; without a GPU torch cannot pin, so a copy stands in."""
    pinned: list[tuple[int, ...]] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tuple(tensor.shape))
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    images = {"pixel_values": torch.randn(2, 3, 4, 4), "spatial_shapes": torch.tensor([[1, 2], [2, 1]])}
    batch = PackedBatch(torch.arange(5), torch.arange(5), [3, 2], [[0], [1]], images, ["a", "b"], 2)
    found = pin_memory(batch)
    assert sorted(pinned) == [(2, 2), (2, 3, 4, 4), (5,)]
    inputs, expected = (one.model_inputs("cpu", torch.bfloat16) for one in (found, batch))
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["spatial_shapes"].dtype == torch.int64
    for name in ("input_ids", "labels", "pixel_values", "spatial_shapes"):
        assert torch.equal(inputs[name], expected[name])
    assert (inputs["text_lengths"], inputs["image_offsets"]) == ([3, 2], [[0], [1]])
    assert found.sample_ids == ["a", "b"]
