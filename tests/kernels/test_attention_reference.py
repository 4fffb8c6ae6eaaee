"""The reference against words, formulas and an independent implementation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout, finish_keys, hierarchical_attention
from hive_ds.kernels.testing import assert_equal_results, evaluate, plain_attention, random_inputs

reference = partial(hierarchical_attention, backend="reference")
NORMS = [("none", False), ("none", True), ("pre_rope", True), ("post_rope", False), ("post_rope", True)]


def mixed_layout() -> AttentionLayout:
    """No image, empty text, one and several images; offsets at the start, middle and end, and twice the same."""
    return AttentionLayout.build(
        [5, 3, 0, 7, 4, 2], [[3], [], [2], [2, 4, 1], [3, 2], [4]], [[0], [], [0], [2, 2, 7], [4, 4], [1]]
    )


def test_by_hand() -> None:
    """Keys of zero weigh alike: a token gets the mean of the values it sees, and its lse is the log of their number."""
    layout = AttentionLayout.build([3], [[2]], [[1]])
    q, k = torch.ones(3, 2, 4), torch.zeros(3, 1, 4)
    v = torch.tensor([1.0, 2.0, 6.0])[:, None, None].expand(3, 1, 4)
    image_v = torch.tensor([10.0, 20.0])[:, None, None].expand(2, 1, 4)
    for backend in ("reference", "auto"):
        out, lse = hierarchical_attention(
            q, k, v, torch.zeros(2, 1, 4), image_v, layout, backend=backend, return_lse=True
        )
        expected = torch.tensor([1.0, (1 + 2 + 30) / 4, (1 + 2 + 6 + 30) / 5])
        torch.testing.assert_close(out, expected[:, None, None].expand(3, 2, 4))
        torch.testing.assert_close(lse, torch.tensor([0.0, math.log(4), math.log(5)])[:, None].expand(3, 2))


def test_backends_asked_for_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with the reference elsewhere is not the reference, and the reference is not what it judges."""
    ran = []
    for name in ("reference_attention", "dense_attention"):

        def spy(*given: object, which: str = name, **options: object) -> tuple[Tensor, None]:
            ran.append(which)
            return given[0], None  # type: ignore[return-value]

        monkeypatch.setattr(f"hive_ds.kernels.op.{name}", spy)
    layout, x = AttentionLayout.build([2], [[]], [[]]), torch.zeros(2, 1, 4)
    for backend in ("reference", "sdpa", "auto"):
        hierarchical_attention(x, x, x, None, None, layout, backend=backend)
    assert ran == ["reference_attention", "dense_attention", "dense_attention"]


def test_query_heads_read_their_group() -> None:
    """Head h reads key/value head h // (H/G): a single token returns its own value of that head."""
    layout = AttentionLayout.build([1], [[]], [[]])
    v = torch.arange(3.0)[None, :, None].expand(1, 3, 4)
    for backend in ("reference", "auto"):
        out = hierarchical_attention(torch.ones(1, 6, 4), v, v, None, None, layout, backend=backend)
        assert isinstance(out, Tensor)
        assert out[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("qk_norm", "rotate"), NORMS)
def test_equals_an_independent_implementation(qk_norm: str, rotate: bool) -> None:
    inputs = random_inputs(mixed_layout(), heads=6, groups=2, head_dim=16, qk_norm=qk_norm, rotate=rotate)
    assert_equal_results(
        evaluate(inputs, reference, return_lse=True), evaluate(inputs, plain_attention, return_lse=True)
    )


def test_head_dim_256() -> None:
    inputs = random_inputs(mixed_layout(), heads=2, groups=1, head_dim=256, qk_norm="pre_rope", rotate=True)
    assert_equal_results(
        evaluate(inputs, reference, return_lse=True), evaluate(inputs, plain_attention, return_lse=True)
    )


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("qk_norm", "rotate"), [("none", False), ("pre_rope", True), ("post_rope", True)])
def test_gradcheck(backend: str, return_lse: bool, qk_norm: str, rotate: bool) -> None:
    layout = AttentionLayout.build([2, 0, 1], [[2, 1], [1], []], [[1, 2], [0], []])
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=4, qk_norm=qk_norm, rotate=rotate)
    names = list(inputs.tensors)

    def call(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return hierarchical_attention(
            **dict(zip(names, tensors, strict=True)),
            **inputs.tables,
            layout=layout,
            qk_norm=qk_norm,
            backend=backend,
            return_lse=return_lse,
        )

    leaves = [x.clone().requires_grad_() for x in inputs.tensors.values()]
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [mixed_layout(), AttentionLayout.build([0], [[2]], [[0]])], ids=["mixed", "no text"])
def test_dtypes(dtype: torch.dtype, layout: AttentionLayout) -> None:
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=8)
    for backend in ("reference", "auto"):
        found = evaluate(inputs, hierarchical_attention, dtype=dtype, return_lse=True, backend=backend)
        assert found["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert {x.dtype for name, x in found.items() if name != "lse"} == {dtype}


class TestFinish:
    """Norm and rotation against the formulas as Hugging Face's Llama and Qwen3 write them."""

    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.linspace(0.5, 2, 8, dtype=torch.float64)
    angle = torch.linspace(-2, 2, 20, dtype=torch.float64).view(5, 4).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()

    def rotated(self, x: Tensor) -> Tensor:
        return x * self.cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * self.sin[:, None]

    def normed(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    def test_orders(self) -> None:
        close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        close(finish_keys(self.x, cos=self.cos, sin=self.sin), self.rotated(self.x))
        close(finish_keys(self.x, self.weight, 1e-3, "pre_rope", self.cos, self.sin), self.rotated(self.normed(self.x)))
        close(
            finish_keys(self.x, self.weight, 1e-3, "post_rope", self.cos, self.sin), self.normed(self.rotated(self.x))
        )
        close(finish_keys(self.x, self.weight, 1e-3, "post_rope"), self.normed(self.x))
        assert torch.equal(finish_keys(self.x), self.x)

    def test_half_tables_equal_full_ones(self) -> None:
        x = self.x.bfloat16()
        full = finish_keys(x, cos=self.cos.float(), sin=self.sin.float())
        assert torch.equal(finish_keys(x, cos=self.cos[:, :4].float(), sin=self.sin[:, :4].float()), full)

    def test_low_precision_is_cast_once(self) -> None:
        x, weight = self.x.bfloat16(), self.weight.bfloat16()
        exact = finish_keys(x.float(), weight.float(), 1e-3, "pre_rope", self.cos.float(), self.sin.float())
        found = finish_keys(x, weight, 1e-3, "pre_rope", self.cos.float(), self.sin.float())
        assert torch.equal(found, exact.bfloat16())
