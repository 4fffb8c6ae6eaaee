"""What the page and a figure say of an answer's maps: whose share, at which layer, on which scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hive_ds.analysis.attention_pictures import Row
from hive_ds.analysis.maps import AttentionMaps, LayerMaps
from hive_ds.chat import answer_maps
from hive_ds.chat.answer_maps import MOST_ROWS, AnswerMaps
from hive_ds.chat.conversation import GREEDY, AnswerSettings
from hive_ds.chat.page import best_layer, describe


def maps_of(tokens: int) -> AnswerMaps:
    """Of an answer of so many tokens on 2 x 3 patches: at layer 1 a tenth of the attention, at layer 3 six tenths."""
    layers = []
    for layer, share in ((1, 0.1), (3, 0.6)):
        patches = torch.full((tokens, 1, 2, 3), share / 10)
        patches[:, :, 1, 2] = share / 2
        layers.append(LayerMaps(layer, (), torch.zeros(tokens, tokens), [patches, patches]))
    rows = [Row("whole answer", list(range(tokens))), *(Row(f"token {place}", [place]) for place in range(tokens))]
    return AnswerMaps(
        AttentionMaps(list(range(tokens)), layers),
        rows,
        [Image.new("RGB", size, "grey") for size in ((60, 40), (40, 60))],
    )


def test_the_best_layer_and_its_share() -> None:
    maps = maps_of(3)
    assert best_layer(maps) == 1
    assert describe(maps, 0, 1) == (
        "60% of the attention is on the picture, at most 30.0% on one patch of 2 x 3; the rest is on the text."
    )


def test_a_panel_is_pale_on_the_scale_of_all() -> None:
    maps = maps_of(3)
    strength = [np.ptp(np.asarray(maps.panel(0, layer, 0)).astype(int), axis=2).max() for layer in (0, 1)]
    assert strength[1] > 2 * strength[0]
    own = [np.asarray(maps.panel(0, layer, 0, per_panel=True)).astype(int) for layer in (0, 1)]
    assert np.abs(own[0] - own[1]).max() <= 2
    assert [maps.panel(0, 0, image).size for image in (0, 1)] == [(640, 427), (427, 640)]


def test_a_long_answer_says_how_much_of_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole answer takes a row, and is no token."""
    drawn: list[tuple[int, str]] = []
    monkeypatch.setattr(
        answer_maps, "attention_figure", lambda maps, rows, pictures, title, **more: drawn.append((len(rows), title))
    )
    for tokens in (MOST_ROWS - 1, MOST_ROWS):
        maps_of(tokens).figure("what?")
    assert drawn == [(16, "what?"), (16, "what? (first 15 of 16 tokens)")]


def test_settings_of_generation() -> None:
    assert AnswerSettings(beams=3).for_generate() == {**GREEDY, "num_beams": 3}
    drawn = {"do_sample": True, "temperature": 0.5}
    assert AnswerSettings(temperature=0.5).for_generate() == {**GREEDY, **drawn, "num_beams": 1}
