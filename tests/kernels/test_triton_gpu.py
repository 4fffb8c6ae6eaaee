"""The Triton kernels at real sizes on a GPU: bf16, CUDA graphs, torch.compile, nothing compiled for new lengths."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout, backends, hierarchical_attention, tiles, warm_up
from hive_ds.kernels.testing import (
    Inputs,
    assert_as_exact,
    assert_equal_results,
    draw_layout,
    evaluate,
    padded_cache,
    plain_attention,
    random_inputs,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or tiles.INTERPRETED or not backends.HAS_TRITON,
        reason="needs a CUDA GPU and Triton: run `make gpu-suite` on a machine with one",
    ),
]

SHAPES = {
    "a": ([64] * 4, [[576]] * 4, [[0]] * 4, 18, 6, 64),
    "a, mixed": (
        [8, 128, 64, 33, 85],
        [[576], [576], [], [576], [100, 200]],
        [[0], [50], [], [33], [0, 40]],
        18,
        6,
        64,
    ),
    "b": ([256] * 2, [[729]] * 2, [[0], [100]], 14, 2, 64),
    "b, mixed": ([256, 19, 400], [[729], [], [729, 196]], [[7], [], [0, 250]], 14, 2, 64),
    "c": ([1024], [[1024]], [[300]], 32, 8, 128),
    "80": ([300, 64], [[577], [40]], [[0], [20]], 8, 2, 80),
    "96": ([300, 64], [[577], [40]], [[0], [20]], 6, 2, 96),
    "256": ([130, 64], [[200], [40]], [[0], [20]], 4, 1, 256),
}
NORMS = [("none", False), ("none", True), ("pre_rope", True), ("post_rope", True)]
triton_attention = partial(hierarchical_attention, backend="triton")


def inputs_of(name: str, qk_norm: str = "pre_rope", rotate: bool = True) -> Inputs:
    *lists, heads, groups, head_dim = SHAPES[name]
    layout = AttentionLayout.build(*lists, device="cuda")
    return random_inputs(layout, heads=heads, groups=groups, head_dim=head_dim, qk_norm=qk_norm, rotate=rotate)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("qk_norm", "rotate"), NORMS)
def test_as_exact_as_plain_code(name: str, dtype: torch.dtype, qk_norm: str, rotate: bool) -> None:
    inputs = inputs_of(name, qk_norm, rotate)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        found = evaluate(inputs, hierarchical_attention, dtype=dtype, return_lse=True)
        again = evaluate(inputs, hierarchical_attention, dtype=dtype, return_lse=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal_results(again, found, tolerance=0)
    plain = evaluate(inputs, plain_attention, dtype=dtype, return_lse=True)
    assert_as_exact(found, plain, evaluate(inputs, plain_attention, return_lse=True), dtype)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(18, 6, 64), (14, 2, 64), (32, 8, 128), (8, 2, 80)])
def test_decoding(cache: bool, heads: int, groups: int, head_dim: int) -> None:
    """One new token a sample; of the cache, rows past each length are NaN."""
    lengths = [700, 1, 64]
    whole = AttentionLayout.build(lengths, [[576], [], [9]], [[0], [], [3]], device="cuda")
    inputs = random_inputs(whole, heads=heads, groups=groups, head_dim=head_dim)
    exact = plain_attention(**inputs.tensors, layout=whole)
    half = {name: x.bfloat16() for name, x in inputs.tensors.items()}
    plain = plain_attention(**half, layout=whole)
    assert isinstance(exact, Tensor)
    assert isinstance(plain, Tensor)
    last = torch.tensor(lengths).cumsum(0) - 1
    step = AttentionLayout.build(lengths, [[576], [], [9]], [[0], [], [3]], [1, 1, 1], device="cuda")
    k, v = (padded_cache(half[name], lengths, 1024) if cache else half[name] for name in "kv")
    out = triton_attention(half["q"][last], k, v, half["image_k"], half["image_v"], step)
    assert isinstance(out, Tensor)
    assert_as_exact({"out": out}, {"out": plain[last]}, {"out": exact[last]}, torch.bfloat16)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_cuda_graph(name: str) -> None:
    """Forward and backward captured once; a replay on other numbers equals an eager call on them."""
    inputs = inputs_of(name)
    leaves = {key: x.bfloat16().requires_grad_() for key, x in inputs.tensors.items()}
    options: dict[str, Any] = {key: x.float() for key, x in inputs.tables.items()}
    options |= {"layout": inputs.layout, "qk_norm": inputs.qk_norm}

    def step() -> tuple[Tensor, ...]:
        out = triton_attention(**leaves, **options)
        assert isinstance(out, Tensor)
        return (out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out)))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles, and builds the layout's tables
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves.values():
            x.mul_(-0.5)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


def test_torch_compile() -> None:
    inputs = inputs_of("b, mixed")
    expected = evaluate(inputs, triton_attention, dtype=torch.bfloat16)
    compiled = torch.compile(triton_attention, fullgraph=True)
    assert_equal_results(evaluate(inputs, compiled, dtype=torch.bfloat16), expected, tolerance=0)


def test_new_lengths_compile_nothing() -> None:
    """After the warm-up no batch of the model's shape, norm weights in bf16 too, adds a binary to any kernel."""
    from hive_ds.kernels import triton_launch
    from hive_ds.kernels.launching import Launcher

    kernels = [launcher.kernel for launcher in vars(triton_launch).values() if isinstance(launcher, Launcher)]

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def in_bf16(**a: Any) -> Any:
        return triton_attention(**a | {name: a[name].bfloat16() for name in a if name.endswith("weight")})

    options = {"heads": 6, "groups": 2, "head_dim": 64}
    warm_up(**options, dtype=torch.bfloat16, device="cuda", qk_norm="pre_rope")  # type: ignore[arg-type]
    before = compiled()
    assert before > 0
    generator = random.Random(0)
    for _ in range(20):
        lengths = [generator.randint(0, 300) for _ in range(generator.randint(1, 9))]
        images = [[generator.randint(1, 600) for _ in range(generator.randint(0, 2))] for _ in lengths]
        offsets = [
            sorted(generator.randint(0, length) for _ in row) for length, row in zip(lengths, images, strict=True)
        ]
        layout = AttentionLayout.build(lengths, images, offsets, device="cuda")
        inputs = random_inputs(layout, qk_norm="pre_rope", rotate=True, **options)
        half = {key: table[:, :32].contiguous() for key, table in inputs.tables.items()}
        half_tables = Inputs(layout, inputs.tensors, half, "pre_rope")
        evaluate(half_tables, in_bf16, dtype=torch.bfloat16)
    assert compiled() == before


@pytest.mark.long
def test_ten_thousand_drawn_layouts() -> None:
    for seed in range(10_000):
        generator = random.Random(seed)
        layout = draw_layout(generator.randint, device="cuda")
        qk_norm, rotate = generator.choice(NORMS)
        heads, groups = generator.choice([(1, 1), (3, 1), (4, 2)])
        inputs = random_inputs(
            layout, heads=heads, groups=groups, head_dim=32, qk_norm=qk_norm, rotate=rotate, seed=seed
        )
        dtype = generator.choice([torch.bfloat16, torch.float16, torch.float32])
        found = evaluate(inputs, triton_attention, dtype=dtype, return_lse=True)
        plain = evaluate(inputs, plain_attention, dtype=dtype, return_lse=True)
        assert_as_exact(found, plain, evaluate(inputs, plain_attention, return_lse=True), dtype)
