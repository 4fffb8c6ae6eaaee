"""The batched path: equal to the reference forward and backward, and the properties of the method."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hive_ds.kernels import AttentionLayout, hierarchical_attention
from hive_ds.kernels.padded_op import padded_attention
from hive_ds.kernels.rectangle_op import rectangle_attention
from hive_ds.kernels.testing import (
    LAYOUTS,
    Inputs,
    Results,
    assert_as_exact,
    assert_equal_results,
    evaluate,
    plain_attention,
    pooled,
    random_inputs,
)

NORMS = [("none", False), ("pre_rope", True), ("post_rope", True)]


def several_images(head_dim: int = 16) -> Inputs:
    layout = AttentionLayout.build(*LAYOUTS["several images"])
    return random_inputs(layout, heads=6, groups=2, head_dim=head_dim, qk_norm="pre_rope", rotate=True)


def compare(inputs: Inputs) -> None:
    for return_lse in (False, True):
        expected = evaluate(inputs, hierarchical_attention, return_lse=return_lse, backend="reference")
        assert_equal_results(evaluate(inputs, hierarchical_attention, return_lse=return_lse), expected)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("qk_norm", "rotate"), NORMS)
def test_equals_reference(name: str, qk_norm: str, rotate: bool) -> None:
    layout = AttentionLayout.build(*LAYOUTS[name])
    compare(random_inputs(layout, heads=6, groups=2, head_dim=16, qk_norm=qk_norm, rotate=rotate))


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (1, 1), (6, 2), (7, 1), (14, 2)])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_heads_and_head_dims(heads: int, groups: int, head_dim: int) -> None:
    layout = AttentionLayout.build(*LAYOUTS["several images"])
    compare(random_inputs(layout, heads=heads, groups=groups, head_dim=head_dim, qk_norm="post_rope", rotate=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("qk_norm", "rotate"), NORMS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_as_exact_as_plain_code(dtype: torch.dtype, return_lse: bool, qk_norm: str, rotate: bool, backend: str) -> None:
    layout = AttentionLayout.build([40, 9, 64], [[49], [], [20, 30]], [[0], [], [10, 33]])
    draws = [
        random_inputs(layout, heads=6, groups=2, head_dim=64, qk_norm=qk_norm, rotate=rotate, seed=seed)
        for seed in range(4)
    ]

    def results(attend: Callable[..., Any], **options: Any) -> Results:
        return pooled([evaluate(inputs, attend, return_lse=return_lse, **options) for inputs in draws])

    actual = results(hierarchical_attention, dtype=dtype, backend=backend)
    assert_as_exact(actual, results(plain_attention, dtype=dtype), results(plain_attention), dtype)


def test_a_thousand_keys() -> None:
    """Sizes at which the fused kernel works in several blocks of queries and of keys."""
    layout = AttentionLayout.build([300, 411], [[576], [196, 729]], [[5], [0, 300]])
    inputs = random_inputs(layout, heads=3, groups=1, head_dim=32, qk_norm="pre_rope", rotate=True)
    actual = evaluate(inputs, hierarchical_attention, dtype=torch.float32)
    plain = evaluate(inputs, plain_attention, dtype=torch.float32)
    assert_as_exact(actual, plain, evaluate(inputs, plain_attention), torch.float32)


@pytest.mark.parametrize("return_lse", [False, True])
def test_packed_equals_one_by_one(return_lse: bool) -> None:
    layout = AttentionLayout.build([4, 0, 6, 3], [[2, 3], [1], [], [4]], [[1, 3], [0], [], [0]])
    inputs = random_inputs(layout, heads=6, groups=2, head_dim=16, qk_norm="pre_rope", rotate=True)

    def outputs(one: Inputs) -> tuple[Tensor, ...]:
        options = {"layout": one.layout, "qk_norm": "pre_rope", "return_lse": return_lse}
        found = hierarchical_attention(**one.tensors, **one.tables, **options)
        return found if isinstance(found, tuple) else (found,)

    alone = [outputs(inputs.select(sample)) for sample in range(layout.num_samples)]
    for packed, parts in zip(outputs(inputs), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(packed, torch.cat(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_image_at_the_end_equals_no_image(backend: str) -> None:
    """Moved to the text's end an image changes nothing and gets a gradient of exact zeros, whatever it holds."""
    with_image = random_inputs(AttentionLayout.build([5, 3], [[], [4]], [[], [3]]), heads=2, groups=1, head_dim=8)
    for name in ("image_k", "image_v"):
        with_image.tensors[name].mul_(1e3)
    without = random_inputs(AttentionLayout.build([5, 3], [[], []], [[], []]), heads=2, groups=1, head_dim=8)
    for name in ("q", "k", "v"):
        without.tensors[name].copy_(with_image.tensors[name])
    for return_lse in (False, True):
        seen = evaluate(with_image, hierarchical_attention, return_lse=return_lse, backend=backend)
        for name in ("grad image_k", "grad image_v"):
            gradient = seen.pop(name)
            assert gradient.shape == (4, 1, 8)
            assert torch.count_nonzero(gradient) == 0
        unseen = evaluate(without, hierarchical_attention, return_lse=return_lse, backend=backend)
        assert_equal_results(seen, {name: x for name, x in unseen.items() if name in seen}, tolerance=1e-14)


def test_permuting_patches_changes_nothing() -> None:
    inputs = random_inputs(
        AttentionLayout.build([5], [[6]], [[2]]), heads=2, groups=1, head_dim=8, qk_norm="pre_rope", rotate=True
    )
    order = torch.tensor([3, 0, 5, 1, 4, 2])

    def permuted(named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x[order] if name.startswith("image") else x for name, x in named.items()}

    shuffled = Inputs(inputs.layout, permuted(inputs.tensors), permuted(inputs.tables), inputs.qk_norm)
    plain, moved = evaluate(inputs, hierarchical_attention), evaluate(shuffled, hierarchical_attention)
    for name in ("grad image_k", "grad image_v"):
        moved[name] = moved[name][order.argsort()]
    assert_equal_results(moved, plain, tolerance=1e-13)


def test_tokens_before_an_image_do_not_depend_on_it() -> None:
    """Forward and backward, to the last bit."""
    inputs = random_inputs(AttentionLayout.build([6, 4], [[5], [3]], [[3], [0]]), heads=2, groups=1, head_dim=8)

    def outputs_and_gradient(image_scale: float) -> tuple[Tensor, Tensor]:
        tensors = dict(inputs.tensors)
        tensors["image_k"] = (tensors["image_k"] * image_scale).requires_grad_()
        out = hierarchical_attention(**tensors, layout=inputs.layout)
        assert isinstance(out, Tensor)
        (gradient,) = torch.autograd.grad(out[:3].sum(), tensors["image_k"])
        return out, gradient

    (first, gradient), (second, _) = outputs_and_gradient(1.0), outputs_and_gradient(-7.0)
    assert torch.equal(first[:3], second[:3])
    assert not torch.equal(first[3], second[3])
    assert torch.count_nonzero(gradient) == 0


def test_a_sample_of_nan_stays_alone() -> None:
    """Samples of unlike lengths share a rectangle, and nothing else."""
    layout = AttentionLayout.build([2, 5, 4], [[3], [1], []], [[0], [2], []])
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=8)
    for name, rows in (("q", 2), ("k", 2), ("v", 2), ("image_k", 3), ("image_v", 3)):
        inputs.tensors[name][:rows] = float("nan")
    for return_lse in (False, True):
        found = evaluate(inputs, hierarchical_attention, return_lse=return_lse)
        for name, x in found.items():
            own = 3 if "image" in name else 2
            assert x[:own].isnan().all(), name
            assert x[own:].isfinite().all(), name


@pytest.mark.parametrize("name", ["several images", "no image, one length"])
def test_inputs_need_not_be_contiguous(name: str) -> None:
    inputs = random_inputs(AttentionLayout.build(*LAYOUTS[name]), heads=6, groups=2, head_dim=16)
    strided = {key: x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for key, x in inputs.tensors.items()}
    assert not strided["q"].is_contiguous()
    other = Inputs(inputs.layout, strided, {}, "none")
    assert_equal_results(
        evaluate(other, hierarchical_attention), evaluate(inputs, hierarchical_attention), tolerance=1e-14
    )


def test_none_for_images_equals_empty_tensors() -> None:
    inputs = random_inputs(AttentionLayout.build(*LAYOUTS["no image, ragged"]), heads=2, groups=1, head_dim=8)
    q, k, v = (inputs.tensors[name] for name in "qkv")
    expected = hierarchical_attention(**inputs.tensors, layout=inputs.layout)
    assert torch.equal(hierarchical_attention(q, k, v, None, None, inputs.layout), expected)  # type: ignore[arg-type]


def test_softmax_scale() -> None:
    inputs = random_inputs(AttentionLayout.build([4, 2], [[3], []], [[1], []]), heads=2, groups=1, head_dim=8)
    scaled = dict(inputs.tensors, q=inputs.tensors["q"] * 0.3 * 8**0.5)
    for backend in ("auto", "reference"):
        for return_lse in (False, True):
            options = {"layout": inputs.layout, "backend": backend, "return_lse": return_lse}
            torch.testing.assert_close(
                hierarchical_attention(**inputs.tensors, softmax_scale=0.3, **options),
                hierarchical_attention(**scaled, **options),
            )


def test_checkpointing_gives_the_same_gradients() -> None:
    inputs = several_images()

    def checkpointed(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        return checkpoint(lambda: hierarchical_attention(**arguments), use_reentrant=False)

    fresh = Inputs(AttentionLayout.build(*LAYOUTS["several images"]), inputs.tensors, inputs.tables, "pre_rope")
    assert_equal_results(evaluate(fresh, checkpointed), evaluate(inputs, hierarchical_attention), tolerance=0)


def test_a_layout_used_under_inference_mode_still_trains() -> None:
    layout = AttentionLayout.build(*LAYOUTS["several images"])
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=8)
    with torch.inference_mode():
        hierarchical_attention(**inputs.tensors, layout=layout)
    compare(inputs)


def test_repeats_bit_for_bit() -> None:
    inputs = several_images(head_dim=32)
    first = evaluate(inputs, hierarchical_attention, dtype=torch.bfloat16)
    second = evaluate(inputs, hierarchical_attention, dtype=torch.bfloat16)
    assert_equal_results(first, second, tolerance=0)


def test_compiles_without_a_graph_break() -> None:
    inputs = several_images()
    compiled = torch.compile(hierarchical_attention, backend="aot_eager", fullgraph=True)
    expected = evaluate(inputs, hierarchical_attention)  # builds the layout's indices
    assert_equal_results(evaluate(inputs, compiled), expected)


def test_counts_visible_pairs_and_no_padding() -> None:
    """4 H K for each visible pair forward, 10 H K backward, whatever the rectangle holds."""
    layout = AttentionLayout.build([3, 9], [[4], []], [[1], []])
    pairs = (1 + 2 + 3) + 2 * 4 + 9 * 10 // 2
    inputs = random_inputs(layout, heads=4, groups=2, head_dim=32)
    with FlopCounterMode(display=False) as counter:
        evaluate(inputs, hierarchical_attention)
    assert counter.get_total_flops() == (4 + 10) * 4 * 32 * pairs


@pytest.mark.parametrize("causal", [False, True])
def test_padded_op_as_torch_wants_it(causal: bool) -> None:
    q, k, v = (torch.randn(2, 5, heads, 16).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    seen = (torch.rand(2, 1, 5, 5) > 0.5) | torch.eye(5, dtype=torch.bool)
    mask = None if causal else torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    torch.library.opcheck(padded_attention, (q, k, v, mask, causal, 0.3, 7))


def test_rectangle_op_as_torch_wants_it() -> None:
    """A rectangle with images, one without and one of no query."""
    q, k, v = (torch.randn(rows, heads, 16).requires_grad_() for rows, heads in ((13, 4), (19, 2), (19, 2)))
    seen = (torch.rand(2, 5, 8) > 0.5) | (torch.arange(8) == 0)
    mask = torch.zeros(80).masked_fill_(~seen.flatten(), float("-inf"))
    torch.library.opcheck(rectangle_attention, (q, k, v, mask, [2, 5, 8, 4, 0, 0, 1, 3, 3], 0.3, 7))


@pytest.mark.parametrize(
    ("text", "images", "offsets", "rectangles"),
    [
        ([70, 70, 9, 130], [[40], [], [30, 20], [8]], [[0], [], [4, 9], [130]], [[0, 1], [2], [3]]),
        ([3, 4, 90, 91, 92], [[], [5], [64], [64], [64]], [[], [1], [0], [90], [0]], [[0, 1], [2, 3, 4]]),
        ([100, 0, 0, 100], [[], [7], [], []], [[], [0], [], []], [[0], [1, 2], [3]]),
        ([64, 64, 64], [[], [], []], [[], [], []], [[0, 1, 2]]),
    ],
    ids=["unlike lengths", "sorted", "empty texts", "alike"],
)
def test_runs_of_about_one_length_share_a_rectangle(
    text: list[int], images: list[list[int]], offsets: list[list[int]], rectangles: list[list[int]]
) -> None:
    layout = AttentionLayout.build(text, images, offsets)
    assert [list(run.samples) for run in layout.rectangles.runs] == rectangles
    compare(random_inputs(layout, heads=4, groups=2, head_dim=16, qk_norm="pre_rope", rotate=True))


@pytest.mark.parametrize("backend", ["sdpa", "triton", "reference"])
def test_tables_go_with_the_batch(backend: str) -> None:
    """A layout is in no circle of references, which would keep its tables until Python collects."""
    inputs = several_images()
    gc.collect()
    gc.disable()
    try:
        evaluate(inputs, hierarchical_attention, dtype=torch.float32, backend=backend)
        layout = weakref.ref(inputs.layout)
        del inputs
        assert layout() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("queries", [None, [4, 4, 4]])
@pytest.mark.parametrize("gradient", ["expanded", "strided"])
def test_gradients_of_any_stride(gradient: str, queries: list[int] | None) -> None:
    """A sum hands back one number expanded, a transposition rows that do not lie in memory."""
    layout = AttentionLayout.build(*LAYOUTS["no image, one length"], queries)
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=8)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        leaves = [inputs.tensors[name].clone().requires_grad_() for name in "qkv"]
        out = hierarchical_attention(*leaves, None, None, inputs.layout, backend=backend)
        assert isinstance(out, Tensor)
        weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape[::-1]).permute(2, 1, 0)
        return torch.autograd.grad(out.sum() if gradient == "expanded" else (out * weights).sum(), leaves)

    for found, expected in zip(gradients("auto"), gradients("reference"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: run `make gpu-suite` on a machine with one"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("qk_norm", "rotate"), NORMS)
def test_on_a_gpu(dtype: torch.dtype, return_lse: bool, qk_norm: str, rotate: bool) -> None:
    layout = AttentionLayout.build([40, 9, 64], [[49], [], [20, 30]], [[0], [], [10, 33]], device="cuda")
    inputs = random_inputs(layout, heads=6, groups=2, head_dim=64, qk_norm=qk_norm, rotate=rotate)
    actual = evaluate(inputs, hierarchical_attention, dtype=dtype, return_lse=return_lse)
    plain = evaluate(inputs, plain_attention, dtype=dtype, return_lse=return_lse)
    assert_as_exact(actual, plain, evaluate(inputs, plain_attention, return_lse=return_lse), dtype)
