"""Wrong arguments: one ValueError each, naming the argument, what it was and what it must be."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hive_ds.kernels import AttentionLayout, finish_keys, hierarchical_attention
from hive_ds.kernels.testing import random_inputs

LAYOUT = AttentionLayout.build([3, 2], [[2, 1], []], [[0, 2], []])
DECODING = AttentionLayout.build([3, 2], [[2, 1], []], [[0, 2], []], query_lengths=[1, 2])


def correct() -> dict[str, Any]:
    inputs = random_inputs(LAYOUT, heads=4, groups=2, head_dim=8, qk_norm="pre_rope", rotate=True)
    tensors = {name: x.float() for name, x in (inputs.tensors | inputs.tables).items()}
    return {**tensors, "layout": LAYOUT, "qk_norm": "pre_rope"}


def correct_decoding() -> dict[str, Any]:
    left_out = ("k_norm_weight", "image_cos", "image_sin")
    arguments = {name: x for name, x in correct().items() if name not in left_out}
    for name in ("q", "cos", "sin"):
        arguments[name] = arguments[name][:3]
    return arguments | {"layout": DECODING}


def zeros(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(*shape, **options)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "backend unknown": ({"backend": "cuda"}, "backend is 'cuda'; expected one of 'auto', 'triton', 'sdpa'"),
    "q rank": ({"q": zeros(5, 32)}, "q has shape (5, 32); expected (5, H, K)"),
    "q rows": ({"q": zeros(4, 4, 8)}, "q has shape (4, 4, 8); expected (5, H, K)"),
    "q dtype": ({"q": zeros(5, 4, 8, dtype=torch.int32)}, "q is torch.int32; expected one of torch.bfloat16"),
    "q device": ({"q": zeros(5, 4, 8, device="meta")}, "q is on meta; expected cpu"),
    "k rows": ({"k": zeros(4, 2, 8)}, "k has shape (4, 2, 8); expected (5, G, 8)"),
    "k head dim": ({"k": zeros(5, 2, 16)}, "k has shape (5, 2, 16); expected (5, G, 8)"),
    "k heads": ({"k": zeros(5, 3, 8)}, "k has 3 heads; expected a number that divides q's 4"),
    "k no heads": ({"k": zeros(5, 0, 8)}, "k has 0 heads"),
    "k dtype": ({"k": zeros(5, 2, 8).half()}, "k is torch.float16; expected torch.float32 like q"),
    "k device": ({"k": zeros(5, 2, 8, device="meta")}, "k is on meta; expected cpu like q"),
    "k cache outside decoding": ({"k": zeros(2, 3, 2, 8)}, "k has shape (2, 3, 2, 8); expected (5, G, 8)"),
    "v shape": ({"v": zeros(5, 1, 8)}, "v has shape (5, 1, 8); expected (5, 2, 8), the shape of k"),
    "v dtype": ({"v": zeros(5, 2, 8).double()}, "v is torch.float64; expected torch.float32"),
    "image_k None": ({"image_k": None}, "image_k is None; expected shape (3, 2, 8), since the layout lists images"),
    "image_v None": ({"image_v": None}, "image_v is None; expected shape (3, 2, 8)"),
    "image_k rows": ({"image_k": zeros(4, 2, 8)}, "image_k has shape (4, 2, 8); expected (3, 2, 8)"),
    "image_v heads": ({"image_v": zeros(3, 4, 8)}, "image_v has shape (3, 4, 8); expected (3, 2, 8)"),
    "image_k dtype": ({"image_k": zeros(3, 2, 8).bfloat16()}, "image_k is torch.bfloat16; expected torch.float32"),
    "qk_norm unknown": ({"qk_norm": "rms"}, "qk_norm is 'rms'; expected one of 'none', 'pre_rope', 'post_rope'"),
    "weight with none": ({"qk_norm": "none"}, "q_norm_weight is a tensor; expected None, since qk_norm is 'none'"),
    "k weight with none": ({"qk_norm": "none", "q_norm_weight": None}, "k_norm_weight is a tensor; expected None"),
    "q weight missing": ({"q_norm_weight": None}, "q_norm_weight is None; expected shape (8,)"),
    "k weight missing": ({"k_norm_weight": None}, "k_norm_weight is None; expected shape (8,)"),
    "weight shape": ({"k_norm_weight": zeros(4)}, "k_norm_weight has shape (4,); expected (8,)"),
    "weight rank": ({"k_norm_weight": zeros(8, 1)}, "k_norm_weight has shape (8, 1); expected (8,), the head dim"),
    "weight dtype": ({"q_norm_weight": zeros(8).long()}, "q_norm_weight is torch.int64; expected one of torch.bfloat"),
    "weight device": ({"q_norm_weight": zeros(8, device="meta")}, "q_norm_weight is on meta; expected cpu"),
    "pre_rope without tables": ({"cos": None, "sin": None}, "cos is None; expected a table, since qk_norm 'pre_rope'"),
    "sin alone": ({"qk_norm": "post_rope", "cos": None}, "cos is None while sin is not; expected both"),
    "cos alone": ({"sin": None}, "sin is None while cos is not; expected both"),
    "cos rows": ({"cos": zeros(4, 8)}, "cos has shape (4, 8); expected (5, 8) or its first half (5, 4)"),
    "sin width": ({"sin": zeros(5, 6)}, "sin has shape (5, 6); expected (5, 8) or its first half (5, 4)"),
    "half table dtype": ({"cos": zeros(5, 4).bfloat16()}, "cos is torch.bfloat16; expected one of torch.float32"),
    "table dtype": ({"sin": zeros(5, 8).long()}, "sin is torch.int64; expected one of"),
    "table device": ({"sin": zeros(5, 8, device="meta")}, "sin is on meta; expected cpu"),
    "image_cos rows": ({"image_cos": zeros(5, 8)}, "image_cos has shape (5, 8); expected (3, 8)"),
    "image_sin alone": ({"image_cos": None}, "image_cos is None while image_sin is not"),
    "image tables missing": ({"image_cos": None, "image_sin": None}, "image_cos is None; expected a table like cos"),
    "image tables alone": (
        {"qk_norm": "post_rope", "cos": None, "sin": None},
        "image_cos is a table; expected None like cos",
    ),
    "norm_eps": ({"norm_eps": -1e-6}, "norm_eps is -1e-06; expected a number of at least 0"),
    "softmax_scale zero": ({"softmax_scale": 0.0}, "softmax_scale is 0.0; expected a positive number"),
    "softmax_scale inf": ({"softmax_scale": float("inf")}, "softmax_scale is inf; expected a positive number"),
    "softmax_scale nan": ({"softmax_scale": float("nan")}, "softmax_scale is nan; expected a positive number"),
}

WRONG_DECODING: dict[str, tuple[dict[str, Any], str]] = {
    "q rows": ({"q": zeros(5, 4, 8)}, "q has shape (5, 4, 8); expected (3, H, K)"),
    "cos rows": ({"cos": zeros(5, 8), "sin": zeros(5, 8)}, "cos has shape (5, 8); expected (3, 8)"),
    "k_norm_weight": ({"k_norm_weight": zeros(8)}, "k_norm_weight is a tensor; expected None while decoding"),
    "image_cos": ({"image_cos": zeros(3, 8)}, "image_cos is a tensor; expected None while decoding"),
    "image_sin": ({"image_sin": zeros(3, 8)}, "image_sin is a tensor; expected None while decoding"),
    "k rows": ({"k": zeros(3, 2, 8)}, "k has shape (3, 2, 8); expected (5, G, 8) or (2, at least 3, G, 8)"),
    "cache too short": ({"k": zeros(2, 2, 2, 8)}, "k has shape (2, 2, 2, 8); expected (5, G, 8) or (2, at least 3,"),
    "cache lines": ({"k": zeros(3, 3, 2, 8)}, "k has shape (3, 3, 2, 8)"),
    "v packed, k cache": ({"k": zeros(2, 3, 2, 8)}, "v has shape (5, 2, 8); expected (2, 3, 2, 8)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case: str) -> None:
    change, message = WRONG[case]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        hierarchical_attention(**(correct() | change))


@pytest.mark.parametrize("case", WRONG_DECODING)
def test_wrong_argument_while_decoding(case: str) -> None:
    change, message = WRONG_DECODING[case]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        hierarchical_attention(**(correct_decoding() | change))


def test_what_they_change_is_right_without() -> None:
    assert hierarchical_attention(**correct()).shape == (5, 4, 8)  # type: ignore[union-attr]
    assert hierarchical_attention(**correct_decoding()).shape == (3, 4, 8)  # type: ignore[union-attr]


def test_one_of_two_empty_image_tensors() -> None:
    layout = AttentionLayout.build([2], [[]], [[]])
    x = zeros(2, 1, 4)
    with pytest.raises(ValueError, match=r"^image_v is None; expected a tensor, since the other"):
        hierarchical_attention(x, x, x, zeros(0, 1, 4), None, layout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": zeros(5, 8)}, "x has shape (5, 8); expected (T, G, K)"),
        ({"x": zeros(5, 2, 8).long()}, "x is torch.int64; expected one of"),
        ({"qk_norm": "pre"}, "qk_norm is 'pre'; expected one of"),
        ({"weight": zeros(8)}, "weight is a tensor; expected None"),
        ({"qk_norm": "post_rope"}, "weight is None; expected shape (8,)"),
        ({"qk_norm": "pre_rope", "weight": zeros(8)}, "cos is None; expected a table"),
        ({"cos": zeros(5, 8)}, "sin is None while cos is not"),
        ({"cos": zeros(2, 8), "sin": zeros(2, 8)}, "cos has shape (2, 8); expected (5, 8)"),
        (
            {"x": zeros(5, 2, 7), "cos": zeros(5, 7), "sin": zeros(5, 7)},
            "cos is a table; expected None, since the head",
        ),
        ({"eps": -1.0}, "eps is -1.0; expected a number of at least 0"),
    ],
)
def test_finish_keys(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        finish_keys(**({"x": zeros(5, 2, 8)} | arguments))
