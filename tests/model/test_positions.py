"""Position ids and rotary tables against figures worked out by hand and against the LLM's own rotary embedding."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_language_model

from hive_ds.model.positions import Positions, RotaryFrequencies, build_positions, frequency_axes

CPU = torch.device("cpu")


def test_two_images_in_two_dimensions():
    positions = build_positions([5, 2], [[(2, 3), (1, 1)], []], [[1, 3], []])
    # Text 0; image of 2 x 3 at 1 advances by 3; texts 1 and 2 at 4 and 5; image of 1 x 1 at 3 + 3; then 7 and 8.
    assert positions.text_T.tolist() == [0, 4, 5, 7, 8, 0, 1]
    assert positions.image_N3.tolist() == [[1, 1, 2], [1, 2, 2], [1, 3, 2], [2, 1, 2], [2, 2, 2], [2, 3, 2], [6, 6, 6]]


def test_one_dimension_counts_patches():
    positions = build_positions([3], [[(2, 3)]], [[1]], rope="1d")
    assert positions.text_T.tolist() == [0, 7, 8]
    assert positions.image_N3[:, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_queries_are_the_last_tokens():
    whole = build_positions([6, 4], [[(2, 2)], []], [[2], []])
    last = build_positions([6, 4], [[(2, 2)], []], [[2], []], query_lengths=[2, 1])
    assert last.text_T.tolist() == whole.text_T[[4, 5, 9]].tolist()


def test_an_image_at_the_end_moves_nothing():
    assert build_positions([3], [[(4, 4)]], [[3]]).text_T.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("head_dim", "row", "column", "time"),
    [(64, 12, 12, 8), (72, 13, 13, 10), (80, 15, 15, 10), (96, 18, 18, 12), (128, 24, 24, 16)],
)
def test_frequencies_are_shared_out_as_documented(head_dim, row, column, time):
    axes = frequency_axes(head_dim // 2)
    assert torch.bincount(axes, minlength=3).tolist() == [row, column, time]
    assert axes[: row + column].tolist() == [0, 1] * row


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_text_tables_are_the_llms_own(family):
    model = tiny_language_model(family)
    tables = RotaryFrequencies(model.model.rotary_emb).tables(build_positions([40], [[]], [[]]), CPU)
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(40)[None])
    torch.testing.assert_close(torch.cat([tables.cos_TK] * 2, dim=1), cos[0])
    torch.testing.assert_close(torch.cat([tables.sin_TK] * 2, dim=1), sin[0])


def test_a_token_with_one_id_on_all_axes_rotates_like_text():
    """Otherwise text and image keys would be rotated by differently ordered frequencies, as in the published code."""
    frequencies = RotaryFrequencies(tiny_language_model().model.rotary_emb)
    ids = torch.arange(30)
    tables = frequencies.tables(Positions(ids, ids[:, None].expand(-1, 3)), CPU)
    torch.testing.assert_close(tables.image_cos_NK, tables.cos_TK, rtol=0, atol=0)
    torch.testing.assert_close(tables.image_sin_NK, tables.sin_TK, rtol=0, atol=0)


def test_frequencies_survive_a_cast_of_the_model():
    model = tiny_language_model()
    before = RotaryFrequencies(model.model.rotary_emb).inv_freq
    after = RotaryFrequencies(model.to(torch.bfloat16).model.rotary_emb).inv_freq
    assert torch.equal(before, after)
