"""The Triton kernels against float64: every branch on small shapes, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout, hierarchical_attention, tiles
from hive_ds.kernels.testing import (
    LAYOUTS,
    Inputs,
    Results,
    assert_as_exact,
    assert_equal_results,
    evaluate,
    plain_attention,
    random_inputs,
)

pytest.importorskip("triton", reason="needs Triton: pip install triton")

DEVICE = "cpu" if tiles.INTERPRETED else "cuda"
NORMS = [("none", False), ("none", True), ("pre_rope", True), ("post_rope", False), ("post_rope", True)]
HALF_TYPES = [torch.float16] if tiles.INTERPRETED else [torch.float16, torch.bfloat16]
"""The interpreter cuts fp32 to bf16 instead of rounding, which costs more than plain code loses."""
HEADS = [(3, 1), (2, 2), (7, 1), (6, 2), (1, 1), (16, 1)]
MIXED = ([9, 3, 0, 7, 4], [[3], [], [2], [20, 4], [17]], [[0], [], [0], [2, 7], [4]])
"""Text and images of several tiles of the interpreter's: no image, one, two; seen from the start, later, and not."""

triton_attention = partial(hierarchical_attention, backend="triton")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What `torch.empty` returns is full of NaN: nothing that a kernel leaves unwritten passes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["one pass", "two passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels of short and of long text, whatever the length."""
    if request.param == "two passes":
        force_two_passes(monkeypatch)
    return str(request.param)


def force_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    from hive_ds.kernels import arguments

    monkeypatch.setattr(arguments, "SHORT_ROWS", 0)
    for table in tiles.TABLE.values():
        for width, tile in table["backward short"].items():
            monkeypatch.setitem(table["backward short"], width, tile._replace(rows=0))


def attend_amid_nan(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`evaluate` casts, and so copies, what it gets: put NaN around the copies."""

    def amid(x: Tensor) -> Tensor:
        around = x.detach().new_full((5, *x.shape[1:]), float("nan"))
        return torch.cat([around, x, around])[5:-5]

    return triton_attention(**{name: amid(x) if isinstance(x, Tensor) else x for name, x in arguments.items()})


def check(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Results:
    found = evaluate(inputs, attend_amid_nan, dtype=dtype, return_lse=True)
    plain = evaluate(inputs, plain_attention, dtype=dtype, return_lse=True)
    assert_as_exact(found, plain, evaluate(inputs, plain_attention, return_lse=True), dtype)
    return found


@pytest.mark.parametrize("index", range(len(LAYOUTS)))
def test_layouts(index: int, passes: str) -> None:
    name = list(LAYOUTS)[index]
    qk_norm, rotate = NORMS[index % len(NORMS)]
    layout = AttentionLayout.build(*LAYOUTS[name], device=DEVICE)
    check(random_inputs(layout, heads=3, groups=1, head_dim=32, qk_norm=qk_norm, rotate=rotate))


@pytest.mark.parametrize(("qk_norm", "rotate"), NORMS)
def test_norms_and_rotation(qk_norm: str, rotate: bool, passes: str) -> None:
    layout = AttentionLayout.build(*MIXED, device=DEVICE)
    check(random_inputs(layout, heads=3, groups=1, head_dim=32, qk_norm=qk_norm, rotate=rotate))


@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_heads(heads: int, groups: int, passes: str) -> None:
    """The last key of the first tile is of another image than the rest."""
    layout = AttentionLayout.build([9, 3], [[15, 6], [2]], [[0, 5], [1]], device=DEVICE)
    check(random_inputs(layout, heads=heads, groups=groups, head_dim=32, qk_norm="pre_rope", rotate=True))


@pytest.mark.parametrize("head_dim", [2, 64, 72, 80, 96, 128, 256])
def test_head_dims(head_dim: int, passes: str) -> None:
    layout = AttentionLayout.build([9, 3], [[3, 18], [2]], [[0, 5], [1]], device=DEVICE)
    check(random_inputs(layout, heads=3, groups=1, head_dim=head_dim, qk_norm="post_rope", rotate=True))


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("qk_norm", "rotate"), [("none", False), ("pre_rope", True), ("post_rope", True)])
def test_half_types(dtype: torch.dtype, qk_norm: str, rotate: bool, passes: str) -> None:
    layout = AttentionLayout.build(*MIXED, device=DEVICE)
    check(random_inputs(layout, heads=6, groups=2, head_dim=64, qk_norm=qk_norm, rotate=rotate), dtype)


def test_text_longer_than_any_short_tile() -> None:
    """Long by itself: several tiles of rows, of text and of image keys, full ones and partly seen ones."""
    layout = AttentionLayout.build([40, 23], [[33], [20, 20]], [[17], [0, 11]], device=DEVICE)
    check(random_inputs(layout, heads=2, groups=1, head_dim=32, qk_norm="pre_rope", rotate=True), torch.float16)


@pytest.mark.parametrize("keys", [(64, 32), (4, 32)])
def test_tiles_of_unlike_sizes(keys: tuple[int, int], passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs have them: the interpreter's are all alike, and one taken for another's would not show."""
    sizes = {"forward short": (16, 32), "forward": (64, 16), "keys": keys, "queries": (16, 32)}
    if passes == "one pass":
        sizes["backward short"] = (128, 32)
    for kind, size in sizes.items():
        monkeypatch.setitem(tiles.TABLE["interpreter"][kind], 32, tiles.Tile(*size, 1, 1))
    layout = AttentionLayout.build([40, 23], [[33], [20, 20]], [[17], [0, 11]], device=DEVICE)
    check(random_inputs(layout, heads=2, groups=1, head_dim=32, qk_norm="pre_rope", rotate=True), torch.float16)


def test_without_lse_and_bit_for_bit(passes: str) -> None:
    layout = AttentionLayout.build(*MIXED, device=DEVICE)
    inputs = random_inputs(layout, heads=3, groups=1, head_dim=32, qk_norm="pre_rope", rotate=True)
    first = evaluate(inputs, triton_attention, dtype=torch.float16)
    fresh = Inputs(AttentionLayout.build(*MIXED, device=DEVICE), inputs.tensors, inputs.tables, inputs.qk_norm)
    assert_equal_results(evaluate(fresh, triton_attention, dtype=torch.float16), first, tolerance=0)
    exact = evaluate(inputs, plain_attention)
    assert_as_exact(first, evaluate(inputs, plain_attention, dtype=torch.float16), exact, torch.float16)


def test_very_low_scores(passes: str) -> None:
    """Near -200, where queries and keys point away from each other under large norm weights: exp(200) is no fp32."""
    layout = AttentionLayout.build([7, 4], [[5], [20]], [[0], [2]], device=DEVICE)
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=64, qk_norm="post_rope")
    for name in ("q", "k", "image_k"):
        inputs.tensors[name].mul_(0.125).add_(1)
    inputs.tensors["q_norm_weight"].fill_(5)
    inputs.tensors["k_norm_weight"].fill_(-5)
    found = evaluate(inputs, triton_attention, dtype=torch.float32, return_lse=True)
    assert found["lse"].max() < -150
    doubles = {name: x.double() for name, x in found.items()}
    assert_equal_results(doubles, evaluate(inputs, plain_attention, return_lse=True), tolerance=1e-3)


def test_unseen_images_get_exact_zeros(passes: str) -> None:
    """Whatever they hold; and what is seen does not change by a bit."""
    layout = AttentionLayout.build([5, 3], [[2], [20]], [[0], [3]], device=DEVICE)
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=32, qk_norm="pre_rope", rotate=True)
    first = evaluate(inputs, triton_attention, dtype=torch.float32)
    for name in ("image_k", "image_v"):
        assert torch.count_nonzero(first[f"grad {name}"][2:]) == 0
        inputs.tensors[name][2:] *= -300
    assert_equal_results(evaluate(inputs, triton_attention, dtype=torch.float32), first, tolerance=0)


def test_nothing_leaks(passes: str) -> None:
    """Tokens before an image do not depend on it, nor samples on each other: forward and backward, to the last bit."""
    layout = AttentionLayout.build([6, 4, 5], [[18], [3], []], [[3], [0], []], device=DEVICE)
    inputs = random_inputs(layout, heads=3, groups=1, head_dim=32, qk_norm="pre_rope", rotate=True)

    def early(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        tensors = {name: x.float().requires_grad_() for name, x in inputs.tensors.items()}
        tables = {name: x.float() for name, x in inputs.tables.items()}
        out = triton_attention(**tensors, **tables, layout=layout, qk_norm="pre_rope")
        assert isinstance(out, Tensor)
        grads = torch.autograd.grad(out[:3].sum(), [tensors["image_k"], tensors["image_v"], tensors["q"]])
        return out.detach(), torch.cat(grads[:2]), grads[2]

    out, image_gradient, q_gradient = early(inputs)
    assert torch.count_nonzero(image_gradient) == 0
    assert torch.count_nonzero(q_gradient[3:]) == 0
    inputs.tensors["image_k"][:18] *= -7
    inputs.tensors["image_v"][:18] += 1
    changed, _, _ = early(inputs)
    assert torch.equal(out[:3], changed[:3])
    assert torch.equal(out[6:], changed[6:])
    assert not torch.equal(out[3:6], changed[3:6])


def test_a_sample_of_nan_stays_alone(passes: str) -> None:
    layout = AttentionLayout.build([2, 5, 4], [[3], [1], []], [[0], [2], []], device=DEVICE)
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=32)
    for name, rows in (("q", 2), ("k", 2), ("v", 2), ("image_k", 3), ("image_v", 3)):
        inputs.tensors[name][:rows] = float("nan")
    for name, x in evaluate(inputs, triton_attention, dtype=torch.float32, return_lse=True).items():
        own = 3 if "image" in name else 2
        assert x[:own].isnan().all(), name
        assert x[own:].isfinite().all(), name


def test_packed_equals_one_by_one() -> None:
    layout = AttentionLayout.build([9, 0, 6, 3], [[2, 17], [1], [], [4]], [[1, 3], [0], [], [0]], device=DEVICE)
    inputs = random_inputs(layout, heads=6, groups=2, head_dim=32, qk_norm="pre_rope", rotate=True)
    packed = evaluate(inputs, triton_attention, dtype=torch.float32, return_lse=True)
    alone = []
    for sample in range(layout.num_samples):
        one = inputs.select(sample)
        tensors = {name: x.float() for name, x in (one.tensors | one.tables).items()}
        alone.append(triton_attention(**tensors, layout=one.layout, qk_norm="pre_rope", return_lse=True))
    for index, name in enumerate(("out", "lse")):
        torch.testing.assert_close(packed[name], torch.cat([found[index] for found in alone]), rtol=0, atol=1e-6)


def test_inputs_need_not_be_contiguous(passes: str) -> None:
    layout = AttentionLayout.build(*MIXED, device=DEVICE)
    inputs = random_inputs(layout, heads=4, groups=2, head_dim=32)
    leaves = {name: x.float() for name, x in inputs.tensors.items()}
    strided = {
        "q": leaves["q"].permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "k": leaves["k"].transpose(0, 1).contiguous().transpose(0, 1),
        "v": torch.stack([leaves["v"]] * 2, dim=1)[:, 1],
        "image_k": torch.cat([leaves["image_k"]] * 2, dim=-1)[..., 32:],
        "image_v": leaves["image_v"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    other = [x.detach().requires_grad_() for x in strided.values()]
    outputs = triton_attention(*other, layout=layout, return_lse=True)
    same = [x.requires_grad_() for x in leaves.values()]
    expected = triton_attention(*same, layout=layout, return_lse=True)
    for x, y in zip(outputs, expected, strict=True):
        assert torch.equal(x, y)
    found = torch.autograd.grad(sum(x.sum() for x in outputs), other)  # of a sum: one number, expanded
    wanted = torch.autograd.grad(expected, same, [torch.ones_like(x) for x in expected])
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("picked", [[1, 0, 1], [0, 1], [2]])
def test_shared_images_add_up(picked: list[int], passes: str) -> None:
    """And those of a sample that was left out get zeros."""
    layout = AttentionLayout.build([3, 2, 4], [[2], [3], [1]], [[0], [1], [0]], device=DEVICE).select(picked)
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=32, qk_norm="pre_rope", rotate=True)
    leaves = {name: x.float() for name, x in inputs.tensors.items()}
    results = []
    for backend in ("triton", "reference"):
        own = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        tables = {name: x.float() for name, x in inputs.tables.items()}
        out = hierarchical_attention(**own, **tables, layout=layout, qk_norm="pre_rope", backend=backend)
        assert isinstance(out, Tensor)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(own.values()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_none_for_images_equals_empty_tensors() -> None:
    layout = AttentionLayout.build(*LAYOUTS["no image, ragged"], device=DEVICE)
    tensors = {name: x.float() for name, x in random_inputs(layout, heads=2, groups=1, head_dim=32).tensors.items()}
    expected = triton_attention(**tensors, layout=layout)
    assert torch.equal(triton_attention(*(tensors[name] for name in "qkv"), None, None, layout), expected)


class Recording:
    """A kernel that writes down the dtype of each table that it is launched with."""

    def __init__(self, kernel: Any, seen: dict[str, set[torch.dtype]]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            for name, value in zip(self.kernel.arg_names, arguments, strict=False):
                if name.endswith(("cos", "sin")) and constants["ROTATE"]:
                    self.seen.setdefault(name, set()).add(value.dtype)
            self.kernel[grid](*arguments, **constants)

        return launch


@pytest.mark.skipif(not tiles.INTERPRETED, reason="needs the Triton interpreter: TRITON_INTERPRET=1")
def test_tables_of_a_rotated_call_have_one_dtype(monkeypatch: pytest.MonkeyPatch, passes: str) -> None:
    """On a GPU a kernel whose branches load tables of two dtypes does not compile: text in half types, no image."""
    from hive_ds.kernels import triton_launch
    from hive_ds.kernels.launching import Launcher

    seen: dict[str, set[torch.dtype]] = {}
    for launcher in vars(triton_launch).values():
        if isinstance(launcher, Launcher):
            monkeypatch.setattr(launcher, "kernel", Recording(launcher.kernel, seen))
    layout = AttentionLayout.build([5, 40], [[], []], [[], []], device=DEVICE)
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=16, rotate=True)
    q, k, v = (inputs.tensors[name].half().requires_grad_() for name in "qkv")
    cos, sin = (inputs.tables[name].float() for name in ("cos", "sin"))
    out = triton_attention(q, k, v, None, None, layout, cos=cos, sin=sin)
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert {"image_cos", "image_sin"} <= seen.keys()
    assert set.union(*seen.values()) == {torch.float32}


@pytest.mark.parametrize("norm_eps", [0.3, 0.0])
@pytest.mark.parametrize("qk_norm", ["pre_rope", "post_rope"])
def test_scale_and_epsilon_are_those_of_the_call(qk_norm: str, norm_eps: float, passes: str) -> None:
    layout = AttentionLayout.build([4, 2], [[3], []], [[1], []], device=DEVICE)
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=16, qk_norm=qk_norm, rotate=True)
    ours, plain = (
        partial(attention, softmax_scale=0.4, norm_eps=norm_eps) for attention in (triton_attention, plain_attention)
    )
    found = evaluate(inputs, ours, dtype=torch.float32, return_lse=True)
    # How exact they are is tested elsewhere; another scale or epsilon is off by a tenth and more.
    doubles = {name: x.double() for name, x in found.items()}
    assert_equal_results(doubles, evaluate(inputs, plain, return_lse=True), tolerance=1e-4)
