"""Drawn layouts: the batched path equals an independent implementation, and decoding in two steps equals one pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hive_ds.kernels import AttentionLayout, hierarchical_attention
from hive_ds.kernels.testing import (
    assert_equal_results,
    draw_layout,
    evaluate,
    padded_cache,
    plain_attention,
    random_inputs,
)


def check_drawn(data: st.DataObject) -> None:
    layout = draw_layout(lambda low, high: data.draw(st.integers(low, high)))
    qk_norm, rotate = data.draw(st.sampled_from([("none", False), ("pre_rope", True), ("post_rope", True)]))
    heads, groups = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 2)]))
    inputs = random_inputs(
        layout,
        heads=heads,
        groups=groups,
        head_dim=4,
        qk_norm=qk_norm,
        rotate=rotate,
        seed=data.draw(st.integers(0, 99)),
    )
    return_lse = data.draw(st.booleans())
    expected = evaluate(inputs, plain_attention, return_lse=return_lse)
    assert_equal_results(evaluate(inputs, hierarchical_attention, return_lse=return_lse), expected)
    if qk_norm == "none":
        check_last_tokens(data, layout, inputs.tensors, expected["out"])


def check_last_tokens(
    data: st.DataObject, layout: AttentionLayout, tensors: dict[str, torch.Tensor], whole: torch.Tensor
) -> None:
    """The last tokens of each sample, drawn how many, attend through a padded cache as in one pass."""
    lengths = layout.text_lengths
    queries = [data.draw(st.integers(0, length)) for length in lengths]
    decoding = AttentionLayout.build(lengths, layout.image_lengths, layout.image_offsets, query_lengths=queries)
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()
    rows = [row for end, count in zip(ends, queries, strict=True) for row in range(end - count, end)]
    out = hierarchical_attention(
        tensors["q"][rows],
        padded_cache(tensors["k"], lengths, layout.max_text + 1),
        padded_cache(tensors["v"], lengths, layout.max_text + 1),
        tensors["image_k"],
        tensors["image_v"],
        decoding,
    )
    torch.testing.assert_close(out, whole[rows], rtol=0, atol=1e-11)


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_drawn_layouts(data: st.DataObject) -> None:
    check_drawn(data)


@pytest.mark.long
@given(st.data())
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_ten_thousand_drawn_layouts(data: st.DataObject) -> None:
    check_drawn(data)


def test_plain_implementation_equals_reference_on_drawn_layouts() -> None:
    """Ties the two oracles together, so that either may judge a backend."""
    generator = torch.Generator().manual_seed(0)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(40):
        inputs = random_inputs(draw_layout(integer), heads=4, groups=2, head_dim=4, seed=seed)
        reference = evaluate(inputs, hierarchical_attention, return_lse=True, backend="reference")
        assert_equal_results(reference, evaluate(inputs, plain_attention, return_lse=True))
