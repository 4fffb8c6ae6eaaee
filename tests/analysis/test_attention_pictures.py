"""Maps lie over the part of the picture that the model saw, on one scale or on each panel's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from hive_ds.analysis.attention_pictures import (
    GAP,
    PANEL,
    Row,
    Scale,
    _column_name,
    attention_figure,
    heat_over,
    seen_part,
)
from hive_ds.analysis.maps import AttentionMaps, LayerMaps
from hive_ds.data.images import process_images

SIDE = 16


def processor_of(kind: str) -> transformers.BaseImageProcessor:
    square, shortest = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
    match kind:
        case "siglip":
            return transformers.SiglipImageProcessor(size=square)
        case "clip":
            return transformers.CLIPImageProcessor(size=shortest, crop_size=square)
        case "dinov2":
            return transformers.BitImageProcessor(size={"shortest_edge": SIDE + 4}, crop_size=square)
    return transformers.LlavaImageProcessor(size=shortest, crop_size=square, do_pad=True)


@pytest.mark.parametrize("size", [(96, 48), (40, 112), (64, 64)])
@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "pad"])
def test_seen_part_is_what_reaches_the_model(kind: str, size: tuple[int, int]) -> None:
    """The bright spot of a picture stands where the pixels for the model have it, or is in neither."""
    processor, inside = processor_of(kind), 0
    for seed in range(12):
        at = np.random.default_rng(seed).integers(0, (size[0] - 8, size[1] - 8))
        picture = Image.new("RGB", size, (60, 60, 60))
        picture.paste((255, 255, 255), (*map(int, at), *map(int, at + 8)))
        pixels = process_images([picture], processor)["pixel_values"][0].mean(0)
        seen = np.asarray(seen_part(picture, processor).convert("L").resize((SIDE, SIDE)), dtype=float)
        if seen.max() - np.median(seen) < 60:  # at the edge of the crop, or outside
            continue
        inside += 1
        theirs, ours = (np.argwhere(x >= x.max() - 0.2 * np.ptp(x)).mean(0) for x in (pixels.numpy(), seen))
        assert np.abs(theirs - ours).max() <= 1
    assert inside >= 4


def maps_of(*images: Tensor) -> AttentionMaps:
    """One layer; ``images`` are (T, rows, columns)."""
    count = len(images[0])
    return AttentionMaps(
        list(range(count)), [LayerMaps(1, (2,), torch.zeros(count, count), [x[:, None] for x in images])]
    )


def panel(figure: Image.Image, row: int, column: int) -> np.ndarray:
    left, top = 130 + column * (PANEL + GAP), 60 + row * (PANEL + GAP)
    return np.asarray(figure.crop((left, top, left + PANEL, top + PANEL))).astype(int)


def test_one_scale_for_all_panels_or_one_for_each() -> None:
    hot = torch.zeros(2, 4, 4)
    hot[0, 1:3, 2:4], hot[1, 1:3, 2:4] = 0.4, 0.1
    rows = [Row("strong", [0]), Row("weak", [1])]
    picture = Image.new("RGB", (64, 64), (90, 90, 90))
    shared = attention_figure(maps_of(hot), rows, [picture])
    own = attention_figure(maps_of(hot), rows, [picture], per_panel=True)
    assert shared.width > own.width  # the scale beside the panels
    assert np.abs(panel(own, 0, 0) - panel(own, 1, 0)).max() <= 2
    assert np.abs(panel(shared, 0, 0) - panel(own, 0, 0)).max() <= 2
    middle = (slice(50, 70), slice(90, 110))  # of the hot patch
    assert np.ptp(panel(shared, 0, 0)[middle], axis=2).mean() > 1.5 * np.ptp(panel(shared, 1, 0)[middle], axis=2).mean()
    mean = attention_figure(maps_of(hot), [Row("both", [0, 1])], [picture], per_panel=True)
    assert np.abs(panel(mean, 0, 0) - panel(own, 0, 0)).max() <= 2


def test_images_of_any_shape_stand_side_by_side() -> None:
    values = torch.rand(1, 2, 5), torch.rand(1, 3, 3)
    pictures = [Image.new("RGB", (500, 200), "red"), Image.new("RGB", (30, 30), "blue")]
    figure = attention_figure(maps_of(*values), [Row("$ _it_ %", [0])], pictures, title="what $x$ is it?")
    assert figure.width > 2 * PANEL
    wide = np.asarray(figure.crop((130, 90, 130 + PANEL, 90 + PANEL)))[:, PANEL // 2]
    drawn = (wide != 255).any(axis=1).nonzero()[0]
    assert (drawn.min(), drawn.max()) == (48, 111), "160 x 64, in the middle of its panel"
    over = heat_over(pictures[0], torch.eye(2), 1.0)
    assert over.size == (500, 200)
    nowhere = np.asarray(heat_over(pictures[0], torch.zeros(2, 2), 1.0)).astype(int)
    assert np.ptp(nowhere, axis=2).max() <= 3, "grey: every colour is the map's"
    assert nowhere.min() >= 180, "light: the map's colours are darker"
    strength = np.ptp(np.asarray(over).astype(int), axis=2)
    assert strength[:40, :100].mean() > 3 * strength[:40, -100:].mean()


def test_columns_are_called_after_layer_blocks_and_image() -> None:
    layer = LayerMaps(4, (2, 7), torch.zeros(1, 1), [])
    assert _column_name(layer, 0, 1) == "layer 4\nblocks 2, 7"
    assert _column_name(LayerMaps(0, (), torch.zeros(1, 1), []), 1, 2) == "image 2\nlayer 0"


def test_one_patch_alone_does_not_pale_the_rest() -> None:
    """The scale ends at the 99th percentile, and says so: the figure has the highest value too."""
    values = torch.full((1, 16, 16), 0.02)
    values[0, 0, 0], values[0, 15, :8] = 0.6, 0.05
    assert Scale.of([values]) == pytest.approx((0.05, 0.6))
    assert Scale.of([torch.eye(20)[None] * (torch.arange(20) == 3)]).end == 1, "nearly all are zero"
    assert Scale.of([]) == (1, 0)
    picture = Image.new("RGB", (64, 64), (20, 20, 20))
    figure = attention_figure(maps_of(values), [Row("one", [0])], [picture])
    few, more = (panel(figure, 0, 0)[at] for at in (np.s_[40:60, 90:110], np.s_[155:, 20:60]))
    assert np.ptp(few, axis=2).mean() > 30, "coloured, though the highest is 30 times as high"
    assert more.mean() < few.mean() - 30
