"""Drawn layouts through the Triton kernels, forward and backward, against an independent implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hive_ds.kernels import AttentionLayout, arguments, hierarchical_attention, tiles
from hive_ds.kernels.testing import (
    ATOL,
    Inputs,
    Results,
    cotangents,
    draw_layout,
    evaluate,
    padded_cache,
    plain_attention,
    random_inputs,
)

pytest.importorskip("triton", reason="needs Triton: pip install triton")

MANY = 1_000
DEVICE = "cpu" if tiles.INTERPRETED else "cuda"


class PooledErrors:
    """Errors over many tiny layouts, and those of plain code in the same dtype.

    One layout of a few numbers can be hit almost exactly by luck, by plain code as well: then a multiple of its error
    bounds nothing. A single layout may be off by one rounding step of its largest number more, and gradients by what
    comes from the stored output's rounding and by a relative error of eps * abs(lse) in fp32: as in every flash
    attention, the backward pass computes weights as exp(score - lse), and the relative error of an exponential is the
    absolute one of its argument. Plain code subtracts the largest score instead, so a weight near one is nearly exact.
    Over many layouts the root mean square of the error may be twice that of plain code, without any of these. Among few
    one that plain code hits almost exactly can decide, so there the relative error is allowed for.
    """

    def __init__(self) -> None:
        self.layouts = 0
        self.squares: dict[tuple[torch.dtype, str], list[float]] = {}

    def add(self, found: Results, plain: Results, exact: Results, rounded: Results, dtype: torch.dtype) -> None:
        self.layouts += 1
        weight_error = torch.finfo(torch.float32).eps * max(exact["lse"].abs().flatten().tolist(), default=0.0)
        for name, expected in exact.items():
            if not expected.numel():
                continue
            error, plain_error = found[name].double() - expected, plain[name].double() - expected
            allowance = ATOL[dtype] + torch.finfo(dtype).eps * expected.abs().max()
            factor = 2
            of_weights = torch.zeros_like(expected)
            if name.startswith("grad"):
                factor = 3
                of_weights = weight_error * expected.abs()
                allowance += rounded[name].abs().max() if name in rounded else 0
                allowance += of_weights.max()
            assert error.abs().max() <= factor * plain_error.abs().max() + allowance, name
            sums = self.squares.setdefault((dtype, name), [0.0, 0.0, 0.0])
            for place, part in enumerate((error, plain_error, of_weights)):
                sums[place] += part.square().sum().item()

    def check(self) -> None:
        assert self.squares
        for kind, (found, plain, of_weights) in self.squares.items():
            allowed = 4 * plain + (of_weights if self.layouts < MANY else 0)
            assert found <= allowed, f"{kind}: squared error {found:.3g} in all, of plain code {plain:.3g}"


def gradients_of_rounding(inputs: Inputs, error: torch.Tensor) -> Results:
    """By how much gradients change where the backward pass reads an output that is off by ``error``.

    As in every flash attention, it sums out * dout: an error there is one in the gradient of lse.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    out, lse = plain_attention(**leaves, **inputs.tables, layout=inputs.layout, qk_norm=inputs.qk_norm, return_lse=True)
    shift = -(error * cotangents({"out": out})[0]).sum(-1)
    gradients = torch.autograd.grad(lse, list(leaves.values()), shift, allow_unused=True)
    return {f"grad {name}": x for name, x in zip(leaves, gradients, strict=True) if x is not None}


def check_drawn(data: st.DataObject, errors: PooledErrors) -> None:
    layout = draw_layout(lambda low, high: data.draw(st.integers(low, high)), device=DEVICE)
    qk_norm, rotate = data.draw(st.sampled_from([("none", False), ("pre_rope", True), ("post_rope", True)]))
    heads, groups = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 2)]))
    seed = data.draw(st.integers(0, 99))
    inputs = random_inputs(layout, heads=heads, groups=groups, head_dim=8, qk_norm=qk_norm, rotate=rotate, seed=seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    exact = evaluate(inputs, plain_attention, return_lse=True)
    plain = evaluate(inputs, plain_attention, return_lse=True, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(arguments.KernelArguments, "fused", lambda _: False)
            patch.setattr(arguments.KernelArguments, "one_pass", lambda _: False)
        found = evaluate(inputs, hierarchical_attention, return_lse=True, dtype=dtype, backend="triton")
    errors.add(found, plain, exact, gradients_of_rounding(inputs, found["out"] - exact["out"]), dtype)
    if qk_norm == "none" and dtype == torch.float32:
        check_last_tokens(data, layout, inputs.tensors, exact["out"])


def check_last_tokens(
    data: st.DataObject, layout: AttentionLayout, tensors: dict[str, torch.Tensor], whole: torch.Tensor
) -> None:
    """The last tokens of each sample, drawn how many, attend through a padded cache as in one pass."""
    lengths = layout.text_lengths
    queries = [data.draw(st.integers(0, length)) for length in lengths]
    decoding = AttentionLayout.build(
        lengths, layout.image_lengths, layout.image_offsets, query_lengths=queries, device=DEVICE
    )
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()
    rows = [row for end, count in zip(ends, queries, strict=True) for row in range(end - count, end)]
    single = {name: x.float() for name, x in tensors.items()}
    out = hierarchical_attention(
        single["q"][rows],
        padded_cache(single["k"], lengths, layout.max_text + 1),
        padded_cache(single["v"], lengths, layout.max_text + 1),
        single["image_k"],
        single["image_v"],
        decoding,
        backend="triton",
    )
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, whole[rows].float(), rtol=1e-5, atol=1e-5)


def check_many(count: int, **options: Any) -> None:
    errors = PooledErrors()

    @given(st.data())
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), **options)
    def check(data: st.DataObject) -> None:
        check_drawn(data, errors)

    check()
    errors.check()


def test_drawn_layouts() -> None:
    check_many(25, derandomize=True)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_two_thousand_drawn_layouts() -> None:
    check_many(2_000)
