"""Token by token, in chunks and with beams: the same as one pass over everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout, backends, dense, finish_keys, hierarchical_attention, tiles
from hive_ds.kernels.testing import Inputs, padded_cache, random_inputs

IMAGES: tuple[list[list[int]], list[list[int]]] = ([[3, 2], [], [4], [1]], [[0, 3], [], [2], [5]])
TEXT = [6, 4, 5, 7]
NORMS = [("none", False), ("pre_rope", True), ("post_rope", True)]


@pytest.fixture(params=["in place", "joined", "reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Triton, the reference, and the batched path's two ways, whatever the size at which it changes between them."""
    monkeypatch.setattr(dense, "IN_PLACE_ELEMENTS", 0 if request.param == "in place" else 2**60)
    if request.param == "triton" and not (backends.HAS_TRITON and tiles.INTERPRETED):
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1 (test_triton_gpu.py decodes on a GPU)")
    return str(request.param) if request.param in ("reference", "triton") else "auto"


def whole_inputs(qk_norm: str, rotate: bool, backend: str) -> Inputs:
    """In float64, or in fp32 for Triton."""
    layout = AttentionLayout.build(TEXT, *IMAGES)
    return for_backend(random_inputs(layout, heads=6, groups=2, head_dim=16, qk_norm=qk_norm, rotate=rotate), backend)


def for_backend(inputs: Inputs, backend: str) -> Inputs:
    dtype = torch.float32 if backend == "triton" else torch.float64
    named = [{name: x.to(dtype) for name, x in part.items()} for part in (inputs.tensors, inputs.tables)]
    return Inputs(inputs.layout, *named, inputs.qk_norm)


def assert_close(found: Tensor, expected: Tensor, *, atol: float = 1e-12) -> None:
    """Equal to within ``atol`` in float64, to rounding in fp32."""
    single = found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5 if single else 0, atol=1e-5 if single else atol)


def one_pass(inputs: Inputs) -> tuple[Tensor, Tensor]:
    result = hierarchical_attention(
        **inputs.tensors, **inputs.tables, layout=inputs.layout, qk_norm=inputs.qk_norm, return_lse=True
    )
    assert isinstance(result, tuple)
    return result


class Decoder:
    """Keys of the whole batch, finished; `step` attends from any span of every sample's tokens."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        tensors, tables, norm = inputs.tensors, inputs.tables, inputs.qk_norm
        weight = tensors.get("k_norm_weight")
        self.keys = finish_keys(tensors["k"], weight, 1e-6, norm, tables.get("cos"), tables.get("sin"))
        self.image_keys = finish_keys(
            tensors["image_k"], weight, 1e-6, norm, tables.get("image_cos"), tables.get("image_sin")
        )

    def rows(self, x: Tensor, first: list[int], last: list[int]) -> Tensor:
        """Rows ``first[b]`` to ``last[b]`` of every sample."""
        samples = x.split(self.inputs.layout.text_lengths)
        return torch.cat([rows[a:b] for rows, a, b in zip(samples, first, last, strict=True)])

    def step(self, layout: AttentionLayout, *, cache: bool, backend: str, return_lse: bool) -> tuple[Tensor, ...]:
        last = layout.text_lengths
        first = [end - queries for end, queries in zip(last, layout.query_lengths, strict=True)]
        keys = self.rows(self.keys, [0] * len(last), last)
        values = self.rows(self.inputs.tensors["v"], [0] * len(last), last)
        if cache:
            keys, values = (padded_cache(x, last, max(last) + 3) for x in (keys, values))
        result = hierarchical_attention(
            self.rows(self.inputs.tensors["q"], first, last),
            keys,
            values,
            self.image_keys,
            self.inputs.tensors["image_v"],
            layout,
            q_norm_weight=self.inputs.tensors.get("q_norm_weight"),
            qk_norm=self.inputs.qk_norm,
            **{name: self.rows(self.inputs.tables[name], first, last) for name in ("cos", "sin") if self.inputs.tables},
            backend=backend,
            return_lse=return_lse,
        )
        return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("qk_norm", "rotate"), NORMS)
def test_steps_equal_one_pass(cache: bool, backend: str, return_lse: bool, qk_norm: str, rotate: bool) -> None:
    """A ragged prompt (offsets beyond it among them), then one token, two at once, one again."""
    inputs = whole_inputs(qk_norm, rotate, backend)
    decoder, expected = Decoder(inputs), one_pass(inputs)
    layout = AttentionLayout.build([2, 0, 1, 3], *IMAGES, query_lengths=[2, 0, 1, 3])
    for advance in (1, 2, 1, 0):
        last = layout.text_lengths
        first = [end - queries for end, queries in zip(last, layout.query_lengths, strict=True)]
        found = decoder.step(layout, cache=cache, backend=backend, return_lse=return_lse)
        assert len(found) == 1 + return_lse
        for x, whole in zip(found, expected, strict=False):
            assert_close(x, decoder.rows(whole, first, last))
        if advance:
            layout = layout.advance(advance)


@pytest.mark.parametrize("cache", [False, True])
def test_ragged_queries_and_samples_that_pause(cache: bool, backend: str) -> None:
    inputs = whole_inputs("pre_rope", True, backend)
    layout = AttentionLayout.build([6, 4, 3, 5], *IMAGES, query_lengths=[1, 0, 3, 2])
    (found,) = Decoder(inputs).step(layout, cache=cache, backend=backend, return_lse=False)
    expected = Decoder(inputs).rows(one_pass(inputs)[0], [5, 4, 0, 3], [6, 4, 3, 5])
    assert_close(found, expected)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("images", [([[], []], [[], []]), ([[3], [3]], [[0], [0]])])
def test_equal_lengths_need_no_mask(length: int, images: tuple[list[list[int]], list[list[int]]], backend: str) -> None:
    """The commonest step: every sample is as long, and the one new token sees everything."""
    inputs = random_inputs(AttentionLayout.build([5, 5], *images), heads=2, groups=1, head_dim=8)
    inputs = for_backend(inputs, backend)
    layout = AttentionLayout.build([length, length], *images, query_lengths=[1, 1])
    assert layout.mask is None
    (found,) = Decoder(inputs).step(layout, cache=True, backend=backend, return_lse=False)
    expected = Decoder(inputs).rows(one_pass(inputs)[0], [length - 1] * 2, [length] * 2)
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_of_nan_beyond_each_length_is_never_read(dtype: torch.dtype, backend: str) -> None:
    """Image keys that nothing sees yet may be NaN too."""
    if backend == "reference":
        pytest.skip("the reference multiplies hidden values by a weight of 0, which does not hide a NaN")
    layout = AttentionLayout.build([2, 3, 2, 3], *IMAGES, query_lengths=[1, 1, 1, 1])
    q = torch.ones(4, 6, 16, dtype=dtype)
    caches = [padded_cache(torch.ones(10, 2, 16, dtype=dtype), [2, 3, 2, 3], 9) for _ in "kv"]
    image = torch.ones(10, 2, 16, dtype=dtype)
    image[3:] = float("nan")
    for return_lse in (False, True):
        result = hierarchical_attention(q, *caches, image, image, layout, return_lse=return_lse, backend=backend)
        out = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("picked", [[0, 0, 0, 2, 2, 2], [1, 1, 0, 0], [1, 2], [3, 0, 3, 2, 0], [2], []])
def test_select_shares_images(cache: bool, backend: str, picked: list[int]) -> None:
    """Beams of one prompt, rows in any order, rows dropped: as if each row's images had been copied for it."""
    layout = AttentionLayout.build([4, 2, 3, 6], *IMAGES, query_lengths=[2, 1, 2, 1]).select(torch.tensor(picked))
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.num_queries, 6, 8), (layout.num_text, 2, 8), (layout.num_text, 2, 8), (10, 2, 8), (10, 2, 8)]
    dtype = torch.float32 if backend == "triton" else torch.float64
    q, k, v, image_k, image_v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    starts = [0, 5, 5, 9]
    rows = [starts[b] + i for b in picked for i in range(sum(IMAGES[0][b]))]
    copied = AttentionLayout.build(
        layout.text_lengths, layout.image_lengths, layout.image_offsets, query_lengths=layout.query_lengths
    )
    assert (layout.num_image, copied.num_image) == (10, len(rows))
    expected = hierarchical_attention(q, k, v, image_k[rows], image_v[rows], copied, backend="reference")
    if cache:
        k, v = (padded_cache(x, layout.text_lengths, 8) for x in (k, v))
    found = hierarchical_attention(q, k, v, image_k, image_v, layout, backend=backend)
    assert_close(found, expected)


def test_caches_need_not_be_contiguous(backend: str) -> None:
    """Heads before slots, as transformers keeps them, and a part of larger memory."""
    layout = AttentionLayout.build([4, 2], [[3], []], [[1], []], query_lengths=[2, 1])
    dtype, generator = torch.float32 if backend == "triton" else torch.float64, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    k, v = normal(2, 2, 9, 16).transpose(1, 2), normal(2, 12, 3, 20)[:, 1:10, 1:, 2:18]
    image_k, image_v = normal(2, 3, 16).transpose(0, 1), normal(3, 16, 2).transpose(1, 2)
    given, q = (k, v, image_k, image_v), normal(3, 6, 16)
    found = hierarchical_attention(q, *given, layout, backend=backend)
    plain = [x.contiguous() for x in given]
    assert not any(x.is_contiguous() for x in given)
    assert_close(found, hierarchical_attention(q, *plain, layout, backend="reference"))


def test_beams_copy_no_image_key() -> None:
    layout = AttentionLayout.build([4, 4], [[3], [3]], [[0], [1]], query_lengths=[1, 1]).select([0, 0, 0, 1, 1, 1])
    image_k = torch.randn(6, 1, 4)
    read = layout.advance(1).select([1, 0, 2, 5, 5, 3]).image_rows.pad(image_k)
    assert read.shape == (2, 3, 1, 4)
    assert read.data_ptr() == image_k.data_ptr()


def test_gradients_through_shared_images_add_up(backend: str) -> None:
    layout = AttentionLayout.build([3, 2], [[2], [3]], [[0], [1]]).select([1, 0, 1])
    inputs = for_backend(random_inputs(layout, heads=2, groups=1, head_dim=8), backend)
    rows = [2, 3, 4, 0, 1, 2, 3, 4]
    copied = AttentionLayout.build(layout.text_lengths, layout.image_lengths, layout.image_offsets)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.tensors.items()}
    spread = {name: x[rows] if name.startswith("image") else x for name, x in leaves.items()}
    shared = hierarchical_attention(**leaves, layout=layout, backend=backend)
    separate = hierarchical_attention(**spread, layout=copied, backend="reference")
    assert isinstance(shared, Tensor)
    assert isinstance(separate, Tensor)
    wanted = torch.autograd.grad(separate.square().sum(), list(leaves.values()))
    found = torch.autograd.grad(shared.square().sum(), list(leaves.values()))
    for x, y in zip(found, wanted, strict=True):
        assert_close(x, y, atol=1e-11)
