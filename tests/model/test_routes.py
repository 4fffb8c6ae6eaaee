"""Routes pair vision blocks with LLM layers and refuse what does not fit."""

from __future__ import annotations

import pytest

from hive_ds.errors import HiveError
from hive_ds.model.routes import Routes, early_end


def build(blocks, layers):
    return Routes.build(blocks, layers, num_blocks=6, num_layers=4)


def test_many_blocks_to_one_layer_and_one_block_to_many_layers():
    routes = build((5, 2, 2), (1, 1, 3))
    assert routes.blocks_by_layer == {1: (5, 2), 3: (2,)}
    assert routes.blocks == (2, 5)
    assert routes.last_block == 5


@pytest.mark.parametrize(
    ("blocks", "layers", "message"),
    [
        ((1, 2), (0,), r"2 vision blocks \[1, 2\] but 1 language layers"),
        ((), (), "no route given"),
        ((0,), (0,), "vision block 0 is out of range; the encoder's are 1 to 6"),
        ((7,), (0,), "vision block 7 is out of range"),
        ((1,), (4,), "language layer 4 is out of range; the LLM's are 0 to 3"),
        ((1,), (-1,), "language layer -1 is out of range"),
        ((1, 1), (2, 2), "block 1 to layer 2 is given twice"),
    ],
)
def test_wrong_routes_are_refused(blocks, layers, message):
    with pytest.raises(HiveError, match=message):
        build(blocks, layers)


def test_routes_of_a_deeper_model_are_answered_with_ones_that_fit():
    with pytest.raises(HiveError) as caught:
        build((2, 5, 8, 11, 11), (1, 2, 3, 4, 5))
    assert str(caught.value) == (
        "routes: vision blocks 8, 11 are out of range; the encoder's are 1 to 6; language layers 4, 5 are out of range;"
        " the LLM's are 0 to 3; spread evenly: routes: {vision_blocks: [1, 2, 4, 5], language_layers: [0, 1, 2, 3]}"
    )


def test_more_routes_than_blocks_are_answered_with_as_many_as_fit():
    with pytest.raises(HiveError, match=r"vision_blocks: \[1, 2\], language_layers: \[1, 3\]"):
        Routes.build((1, 2, 9), (1, 2, 3), num_blocks=3, num_layers=4)


def test_routes_that_end_early_are_noted():
    assert early_end((2, 5), (3, 7), num_blocks=6, num_layers=8) == ""
    noted = early_end((2, 5), (3, 7), num_blocks=12, num_layers=16)
    assert noted.startswith("the routes end at vision block 5 of 12 and language layer 7 of 15; ")
    assert noted.endswith("routes: {vision_blocks: [5, 11], language_layers: [7, 15]}")
    assert "language" not in early_end((2, 5), (3, 7), num_blocks=12, num_layers=8).partition(";")[0]
