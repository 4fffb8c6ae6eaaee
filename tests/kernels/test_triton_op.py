"""The op of torch.library: compiled, checkpointed, its operations counted, its refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hive_ds.kernels import (
    AttentionLayout,
    arguments,
    backends,
    choose_backend,
    fused,
    hierarchical_attention,
    prepare_layout,
    prepared_attention,
    registered,
    tiles,
)
from hive_ds.kernels.testing import Inputs, assert_equal_results, evaluate, random_inputs

pytest.importorskip("triton", reason="needs Triton: pip install triton")

DEVICE = "cpu" if tiles.INTERPRETED else "cuda"
triton_attention = partial(hierarchical_attention, backend="triton")


def small_inputs(qk_norm: str = "pre_rope") -> Inputs:
    layout = AttentionLayout.build([3, 2], [[2], [1]], [[1], [0]], device=DEVICE)
    return random_inputs(layout, heads=2, groups=1, head_dim=32, qk_norm=qk_norm, rotate=True)


def test_checkpointing_gives_the_same_gradients() -> None:
    def checkpointed(**arguments: Any) -> Any:
        return checkpoint(lambda: triton_attention(**arguments), use_reentrant=False)

    expected = evaluate(small_inputs(), triton_attention, dtype=torch.float32)
    assert_equal_results(evaluate(small_inputs(), checkpointed, dtype=torch.float32), expected, tolerance=0)


@pytest.mark.parametrize("return_lse", [False, True])
def test_compiles_without_a_graph_break(return_lse: bool) -> None:
    inputs = small_inputs()
    options = {"dtype": torch.float32, "return_lse": return_lse}
    expected = evaluate(inputs, triton_attention, **options)  # builds the layout's tables
    compiled = torch.compile(triton_attention, backend="aot_eager", fullgraph=True)
    assert_equal_results(evaluate(inputs, compiled, **options), expected, tolerance=0)


def test_fresh_layouts_stop_compiling_anew() -> None:
    """Prepared outside, a layout is read without a graph break; after three the lengths are no constants any more."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(triton_attention, backend=counter, fullgraph=True)
    counts = []
    for lengths in ([3, 2], [4, 1], [5, 2, 3], [7, 7, 1], [2, 9, 4, 4]):
        layout = AttentionLayout.build(lengths, [[2]] * len(lengths), [[1]] * len(lengths), device=DEVICE)
        prepare_layout(layout, heads=2, groups=1, head_dim=32, dtype=torch.float32)
        inputs = random_inputs(layout, heads=2, groups=1, head_dim=32)
        expected = evaluate(inputs, triton_attention, dtype=torch.float32)
        assert_equal_results(evaluate(inputs, compiled, dtype=torch.float32), expected, tolerance=0)
        counts.append(counter.frame_count)
    assert counts[2:] == [counts[2]] * 3


@pytest.mark.parametrize(
    "lists",
    [([3, 2], [[2], [1]], [[1], [0]]), ([40, 23], [[33], [20, 20]], [[17], [0, 11]]), ([9, 2], [[], []], [[], []])],
    ids=["short", "long", "no image"],
)
def test_prepared_tables_serve_as_the_layout_does(lists: tuple[Any, ...]) -> None:
    """To the bit, and with as many operations."""
    layout = AttentionLayout.build(*lists, device=DEVICE)
    inputs = random_inputs(layout, heads=2, groups=1, head_dim=32, qk_norm="pre_rope", rotate=True)
    tables = prepare_layout(layout, heads=2, groups=1, head_dim=32, dtype=torch.float32)

    def prepared(layout: AttentionLayout, return_lse: bool, **given: Any) -> Tensor:
        halves = {name: x[:, :16].contiguous() for name, x in given.items() if name.endswith(("cos", "sin"))}
        given |= dict(softmax_scale=0.2, norm_eps=0.1, tables=tables, **halves)
        if not layout.num_image:
            given |= dict.fromkeys(("image_k", "image_v", "image_cos", "image_sin"))
        return prepared_attention(**given)

    if not layout.num_image:
        for name in ("image_k", "image_v"):
            del inputs.tensors[name]
    found, counts = [], []
    for attend in (prepared, partial(triton_attention, image_k=None, image_v=None, softmax_scale=0.2, norm_eps=0.1)):
        with FlopCounterMode(display=False) as counter:
            found.append(evaluate(inputs, attend, dtype=torch.float32))
        counts.append(counter.get_total_flops())
    assert_equal_results(*found, tolerance=0)
    assert counts[0] == counts[1]


def test_tables_of_shared_images_are_refused() -> None:
    """The kernels would read past the image keys, which only `hierarchical_attention` copies for each sample."""
    layout = AttentionLayout.build([3], [[2]], [[1]], device=DEVICE).select([0, 0])
    with pytest.raises(ValueError, match="samples of the layout share images"):
        prepare_layout(layout, heads=2, groups=1, head_dim=32, dtype=torch.float32)


@pytest.mark.parametrize(("one_pass", "qk_norm"), [(True, "pre_rope"), (False, "pre_rope"), (True, "none")])
def test_registered_as_torch_wants_it(monkeypatch: pytest.MonkeyPatch, one_pass: bool, qk_norm: str) -> None:
    if not one_pass:
        monkeypatch.setattr(arguments.KernelArguments, "one_pass", lambda _: False)
    calls = recorded_calls(monkeypatch, small_inputs(qk_norm))
    for op, given in calls:
        torch.library.opcheck(op, given)


def recorded_calls(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """The ops that a forward and backward pass calls, with their arguments."""
    calls = []

    def recorder(op: Any) -> Any:
        def call(*given: Any) -> Any:
            calls.append((op, tuple(x.detach() if isinstance(x, Tensor) else x for x in given)))
            return op(*given)

        return call

    monkeypatch.setattr(fused, "attend", recorder(registered.attention_op))
    monkeypatch.setattr(registered, "gradient_op", recorder(registered.gradient_op))
    evaluate(inputs, triton_attention, dtype=torch.float32)
    (op, given), backward = calls
    leaves = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) and i < 7 else x for i, x in enumerate(given))
    return [(op, leaves), backward]


@pytest.mark.parametrize("one_pass", [True, False])
def test_an_unused_lse_is_not_gone_through(monkeypatch: pytest.MonkeyPatch, one_pass: bool) -> None:
    """No zeros are made for its gradient; the others are the same to the bit, and its own is right without out's."""
    if not one_pass:
        monkeypatch.setattr(arguments.KernelArguments, "one_pass", lambda _: False)
    _, (_, given) = recorded_calls(monkeypatch, small_inputs())
    dout, dlse, out, lse, *rest = given
    assert dlse is None
    found = registered.gradient_op(dout, None, out, lse, *rest)
    for x, y in zip(found, registered.gradient_op(dout, torch.zeros_like(lse), out, lse, *rest), strict=True):
        assert torch.equal(x, y)

    def lse_alone(backend: str) -> list[Tensor]:
        inputs = small_inputs()
        leaves = {name: x.float().requires_grad_() for name, x in inputs.tensors.items()}
        tables = {name: x.float() for name, x in inputs.tables.items()}
        options: dict[str, Any] = {"layout": inputs.layout, "qk_norm": inputs.qk_norm, "return_lse": True}
        _, lse = hierarchical_attention(**leaves, **tables, **options, backend=backend)
        return list(torch.autograd.grad(lse.sin().sum(), list(leaves.values()), materialize_grads=True))

    for x, y in zip(lse_alone("triton"), lse_alone("reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused() -> None:
    layout = AttentionLayout.build([3], [[]], [[]], device=DEVICE)
    q = torch.randn(3, 1, 32, device=DEVICE, requires_grad=True)
    out = triton_attention(q, q, q, None, None, layout)
    assert isinstance(out, Tensor)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_counts_its_operations() -> None:
    """4 H K for each visible pair forward, 10 H K backward."""
    layout = AttentionLayout.build([3, 2], [[4], [5]], [[1], [2]], device=DEVICE)
    pairs = (1 + 2 + 3) + 2 * 4 + (1 + 2)
    inputs = random_inputs(layout, heads=4, groups=2, head_dim=32)
    with FlopCounterMode(display=False) as counter:
        evaluate(inputs, triton_attention, dtype=torch.float32)
    assert counter.get_total_flops() == (4 + 10) * 4 * 32 * pairs


def test_refused() -> None:
    layout = AttentionLayout.build([2], [[]], [[]], device=DEVICE)

    def call(dtype: torch.dtype = torch.float32, head_dim: int = 32) -> None:
        q = torch.zeros(2, 1, head_dim, dtype=dtype, device=DEVICE)
        triton_attention(q, q, q, None, None, layout)

    with pytest.raises(ValueError, match=r"^backend is 'triton', but q is torch.float64; expected torch.bfloat16"):
        call(torch.float64)
    for head_dim in (33, 258):
        with pytest.raises(ValueError, match=f"^backend is 'triton', but q has head dim {head_dim}; expected an even"):
            call(head_dim=head_dim)


def test_refused_without_triton_and_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, q = AttentionLayout.build([2], [[]], [[]]), torch.zeros(2, 1, 32)
    monkeypatch.setattr(backends, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match=r"^backend is 'triton', but q is on cpu; expected a GPU, or TRITON_INTERPRET=1"
    ):
        triton_attention(q, q, q, None, None, layout)
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"^backend is 'triton', but Triton is not installed; expected the package"):
        triton_attention(q, q, q, None, None, layout)
    assert isinstance(hierarchical_attention(q, q, q, None, None, layout), Tensor)
    shapes = choose_backend("triton", device=torch.device("meta"), dtype=q.dtype, head_dim=32)
    assert shapes.backend == "triton"  # `hive-ds cost` counts with them, and needs neither


@pytest.mark.parametrize("name", ["q", "k", "v", "image_k", "image_v", "q_norm_weight"])
def test_gradients_while_decoding_are_refused(name: str) -> None:
    """By name; `auto` takes another backend on a GPU. The norm weight alone got zeros."""
    layout = AttentionLayout.build([3], [[2]], [[0]], [1], device=DEVICE)
    shapes = {
        "q": (1, 2, 32),
        **dict.fromkeys(("k", "v"), (3, 1, 32)),
        **dict.fromkeys(("image_k", "image_v"), (2, 1, 32)),
    }
    shapes["q_norm_weight"] = (32,)
    given = {key: torch.ones(shape, device=DEVICE, requires_grad=key == name) for key, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"^backend is 'triton', but .*{name}.* needs a gradient; expected none while"):
        triton_attention(**given, layout=layout, qk_norm="post_rope")
    with torch.no_grad():
        triton_attention(**given, layout=layout, qk_norm="post_rope")
