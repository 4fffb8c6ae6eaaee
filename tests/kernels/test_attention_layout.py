"""Layouts: what they refuse, and what is derived from them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from hive_ds.kernels import AttentionLayout

CORRECT: dict[str, Any] = {"text_lengths": [3, 2], "image_lengths": [[2, 1], []], "image_offsets": [[0, 3], []]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_lengths": [3, -1]}, "text_lengths[1] is -1; expected an integer of at least 0"),
        ({"text_lengths": [3.0, 2]}, "text_lengths[0] is 3.0; expected an integer"),
        ({"text_lengths": [3, True]}, "text_lengths[1] is True; expected an integer"),
        ({"image_lengths": [[2, 1]]}, "image_lengths has 1 entries; expected 2, one per entry of text_lengths"),
        ({"image_lengths": [[2, 0], []]}, "image_lengths[0][1] is 0; expected an integer of at least 1"),
        ({"image_offsets": [[0, 3], [], []]}, "image_offsets has 3 entries; expected 2"),
        ({"image_offsets": [[0], []]}, "image_offsets[0] has 1 entries; expected 2 as in image_lengths[0]"),
        ({"image_offsets": [[2, 1], []]}, "image_offsets[0][1] is 1; expected at least 2, the offset of the image bef"),
        ({"image_offsets": [[-1, 1], []]}, "image_offsets[0][0] is -1; expected an integer of at least 0"),
        ({"image_offsets": [[0, 4], []]}, "image_offsets[0][1] is 4; expected at most 3, the sample's text length"),
        ({"query_lengths": [1]}, "query_lengths has 1 entries; expected 2"),
        ({"query_lengths": [1, 3]}, "query_lengths[1] is 3; expected at most 2, text_lengths[1]"),
        ({"query_lengths": [1, -1]}, "query_lengths[1] is -1; expected an integer of at least 0"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        AttentionLayout.build(**(CORRECT | change))


def test_refused_steps() -> None:
    layout = AttentionLayout.build(**CORRECT)
    with pytest.raises(ValueError, match=r"^n is 0; expected an integer of at least 1"):
        layout.advance(0)
    with pytest.raises(ValueError, match=re.escape("samples[1] is 2; expected a sample of this layout, 0 to 1")):
        layout.select([0, 2])
    with pytest.raises(ValueError, match=re.escape("samples[0] is -1; expected")):
        layout.select(torch.tensor([-1]))
    with pytest.raises(ValueError, match=re.escape("samples[0] is True; expected an integer of at least 0")):
        layout.select(torch.tensor([True, False]))  # would be samples 1 and 0


def test_counts() -> None:
    layout = AttentionLayout.build(**CORRECT)
    assert (layout.num_samples, layout.num_text, layout.num_queries, layout.num_image) == (2, 5, 5, 3)
    assert layout.device == torch.device("cpu")
    assert layout.image_starts == [0, 3]
    assert not layout.decoding


def test_numbers_of_numpy_and_torch_become_integers() -> None:
    layout = AttentionLayout.build(
        list(torch.tensor([3, 2])), [list(np.array([2, 1])), []], [[np.int64(0), torch.tensor(3)], []]
    )
    for numbers in (layout.text_lengths, *layout.image_lengths, *layout.image_offsets):
        assert all(type(number) is int for number in numbers)


def test_mask() -> None:
    """Sample 0: an image of two patches before token 1. Sample 1: shorter, its image before token 0."""
    layout = AttentionLayout.build([3, 2], [[2], [1]], [[1], [0]])
    assert layout.mask is not None
    found = ["".join(".x"[int(seen)] for seen in row) for row in layout.mask.flatten(0, 2)]
    assert found == ["x....", "xx.xx", "xxxxx", "x..x.", "xx.x.", "xx.x."]


def test_advance() -> None:
    """Offsets beyond the text so far are allowed while decoding, and come into sight as the text grows."""
    layout = AttentionLayout.build([1, 2], [[4], [3]], [[3], [0]], query_lengths=[1, 2])
    assert layout.seen_lengths == [0, 3]
    later = layout.advance(1).advance(2)
    assert (later.text_lengths, later.query_lengths) == ([4, 5], [2, 2])
    assert later.seen_lengths == [4, 3]
    assert later.image_starts == layout.image_starts
    assert layout.text_lengths == [1, 2]


def test_advance_from_a_batch_that_was_no_decoding() -> None:
    assert AttentionLayout.build(**CORRECT).advance(1).decoding


def test_select() -> None:
    layout = AttentionLayout.build([3, 2, 1], [[2], [], [5]], [[0], [], [1]]).select([2, 0, 0])
    assert layout.text_lengths == [1, 3, 3]
    assert layout.image_lengths == [[5], [2], [2]]
    assert layout.image_starts == [2, 0, 0]
    assert (layout.num_text, layout.num_image) == (7, 7)


def test_one_length_is_read_without_copies() -> None:
    layout = AttentionLayout.build([4, 4], [[3], [3]], [[0], [2]])
    text, image = torch.randn(8, 2, 4), torch.randn(6, 2, 4)
    padded = layout.text_rows.pad(text)
    assert padded.data_ptr() == text.data_ptr()
    assert layout.query_rows.unpad(padded).data_ptr() == text.data_ptr()
    assert layout.image_rows.pad(image).data_ptr() == image.data_ptr()


@pytest.mark.parametrize("lengths", [[2, 0, 3], [0, 1], [4]])
def test_padding_there_and_back(lengths: list[int]) -> None:
    rows = AttentionLayout.build(lengths, [[]] * len(lengths), [[]] * len(lengths)).text_rows
    x = torch.randn(sum(lengths), 2)
    padded = rows.pad(x)
    assert torch.equal(rows.unpad(padded), x)
    for line, length in zip(padded, lengths, strict=True):
        assert torch.count_nonzero(line[length:]) == 0


def test_no_row_of_the_mask_sees_nothing() -> None:
    """Not even padding, where a softmax over nothing would be NaN."""
    layout = AttentionLayout.build([0, 3, 1], [[2], [], [1]], [[0], [], [1]])
    assert layout.mask is not None
    assert layout.mask.any(dim=-1).all()


@pytest.mark.parametrize("kind", ["rows", "keys"])
def test_work_lists_take_samples_in_turn(kind: str) -> None:
    """All of a sample before the next, the sample with the most work first; every tile once, its longest work first."""
    texts, patches = [40, 300, 0, 170], [[64], [], [64], [30, 70]]
    schedule = AttentionLayout.build(texts, patches, [[0], [], [0], [0, 50]]).schedule
    work = (schedule.row_work(2, 64) if kind == "rows" else schedule.key_work(64)).tolist()
    turns = list(dict.fromkeys(sample for sample, *_ in work))
    assert [sample for sample, *_ in work] == sorted((sample for sample, *_ in work), key=turns.index)
    tiles = {sample: [rest for one, *rest in work if one == sample] for sample in turns}
    if kind == "rows":
        assert turns == [1, 3, 0]
        assert tiles == {
            1: [[tile] for tile in range(9, -1, -1)],
            3: [[tile] for tile in range(5, -1, -1)],
            0: [[1], [0]],
        }
    else:
        assert turns == [1, 3, 0, 2]
        text = {1: [[tile, 0] for tile in range(5)], 3: [[0, 0], [0, 1], [1, 1], [1, 0], [2, 0]]}
        assert tiles == {**text, 0: [[0, 0], [0, 1]], 2: [[0, 1]]}


def test_pairs_are_those_of_the_mask() -> None:
    """Of whole texts and while decoding, where cached tokens see and count for nothing."""
    for queries in (None, [2, 2]):
        layout = AttentionLayout.build([5, 3] if queries else [4, 4], [[3], [2, 4]], [[4], [0, 2]], queries)
        assert layout.mask is not None
        assert layout.schedule.pairs == layout.mask.sum()


def test_rectangles_keep_a_mask_for_each_dtype() -> None:
    layout = AttentionLayout.build([3, 2], [[2], [1]], [[1], [0]])
    single, half, again = (layout.rectangles.mask(layout, x) for x in (torch.float32, torch.bfloat16, torch.float32))
    assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(single, half.float())
    assert again is single
