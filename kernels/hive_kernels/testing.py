"""What tests of every backend share: layouts, inputs, an independent plain implementation, when two results agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import AttentionLayout

Results = dict[str, Tensor]
"""By name: "out", "lse", and "grad q", "grad image_k" and so on."""


NO_IMAGE: tuple[list[list[int]], list[list[int]]] = ([[], [], []], [[], [], []])
LAYOUTS: dict[str, tuple[list[int], list[list[int]], list[list[int]]]] = {
    "no image, one length": ([4, 4, 4], *NO_IMAGE),
    "no image, ragged": ([4, 1, 6], *NO_IMAGE),
    "one sample": ([6], [[5]], [[2]]),
    "one length, one image each": ([5, 5], [[3], [3]], [[0], [0]]),
    "offset 0, middle, end": ([4, 5, 6], [[2], [3], [4]], [[0], [3], [6]]),
    "several images": ([7, 3, 5], [[2, 5, 1], [], [3, 3]], [[0, 2, 7], [], [4, 4]]),
    "an unseen image between seen ones": ([3, 4, 3], [[4], [4], [4]], [[1], [4], [0]]),
    "empty text": ([0, 3, 0, 2], [[2], [], [], [3]], [[0], [], [], [1]]),
    "all texts empty": ([0, 0], [[2], []], [[0], []]),
    "no samples": ([], [], []),
    "all images unseen": ([3, 2], [[2], [1, 2]], [[3], [2, 2]]),
}
"""Arguments of `AttentionLayout.build`: every sort of batch."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of `hierarchical_attention`, in float64."""

    layout: AttentionLayout
    tensors: dict[str, Tensor]
    """What gets a gradient: q, k, v, image_k, image_v and the norm weights, by argument name."""
    tables: dict[str, Tensor]
    """Rotation tables by argument name; none if already rotated."""
    qk_norm: str

    def select(self, sample: int) -> Inputs:
        """The arguments that hold one sample only."""
        layout = self.layout
        first_text = sum(layout.text_lengths[:sample])
        text = slice(first_text, first_text + layout.text_lengths[sample])
        image = slice(layout.image_starts[sample], layout.image_starts[sample] + sum(layout.image_lengths[sample]))

        def part(name: str, x: Tensor) -> Tensor:
            return x if name.endswith("weight") else x[image if name.startswith("image") else text]

        alone = AttentionLayout.build(
            [layout.text_lengths[sample]],
            [layout.image_lengths[sample]],
            [layout.image_offsets[sample]],
            device=layout.device,
        )
        tensors = {name: part(name, x) for name, x in self.tensors.items()}
        return Inputs(alone, tensors, {name: part(name, x) for name, x in self.tables.items()}, self.qk_norm)


def random_inputs(
    layout: AttentionLayout,
    *,
    heads: int,
    groups: int,
    head_dim: int,
    qk_norm: str = "none",
    rotate: bool = False,
    seed: int = 0,
) -> Inputs:
    """Normal q, k, v, image_k and image_v on the layout's device, scores of spread about 2.

    They are float64 of few digits, the same numbers in every dtype. Norm weights differ from channel to channel, within
    rotary pairs too; tables carry a scaling as some LLMs' do.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double().to(layout.device)

    text, image = layout.num_text, layout.num_image
    tensors = {"q": normal(text, heads, head_dim) * 2, "k": normal(text, groups, head_dim)}
    tensors |= {"v": normal(text, groups, head_dim), "image_k": normal(image, groups, head_dim)}
    tensors["image_v"] = normal(image, groups, head_dim)
    if qk_norm != "none":
        tensors |= {name: (1 + 0.3 * normal(head_dim)).float().double() for name in ("q_norm_weight", "k_norm_weight")}
    tables: dict[str, Tensor] = {}
    if rotate:
        for prefix, rows in (("", text), ("image_", image)):
            angle = 3 * normal(rows, head_dim // 2).repeat(1, 2)
            tables[f"{prefix}cos"] = (1.1 * angle.cos()).float().double()
            tables[f"{prefix}sin"] = (1.1 * angle.sin()).float().double()
    return Inputs(layout, tensors, tables, qk_norm)


def evaluate(
    inputs: Inputs,
    attend: Callable[..., Tensor | tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype = torch.float64,
    return_lse: bool = False,
    seed: int = 1,
    **options: object,
) -> Results:
    """Call ``attend`` (with the signature of `hierarchical_attention`) and go backward from a random cotangent.

    q, k, v and the image's are cast to ``dtype``; norm weights and tables to its fp32, if it is a half type.
    """
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: x.to(wide if name.endswith("weight") else dtype).detach().requires_grad_()
        for name, x in inputs.tensors.items()
    }
    tables = {name: table.to(wide) for name, table in inputs.tables.items()}
    result = attend(**leaves, **tables, layout=inputs.layout, qk_norm=inputs.qk_norm, return_lse=return_lse, **options)
    outputs = dict(zip(("out", "lse"), result if isinstance(result, tuple) else (result,), strict=False))
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents(outputs, seed))
    found = {name: x.detach() for name, x in outputs.items()}
    return found | {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def cotangents(outputs: Results, seed: int = 1) -> list[Tensor]:
    """Random ones, exact in every dtype: what `evaluate` goes backward from."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs.values()]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    layout: AttentionLayout,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    qk_norm: str = "none",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    image_cos: Tensor | None = None,
    image_sin: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same attention as ordinary code would write it: all samples in one dense mask, everything in q's dtype.

    Shares no code with the backends. What it loses to rounding is the measure in `assert_as_exact`.
    """

    def finished(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            assert weight is not None
            return x * (x.square().mean(-1, keepdim=True) + norm_eps).rsqrt() * weight.to(x.dtype)

        x = norm(x) if qk_norm == "pre_rope" else x
        if cos is not None and sin is not None:
            low, high = x.chunk(2, dim=-1)
            x = x * cos[:, None].to(x.dtype) + torch.cat([-high, low], dim=-1) * sin[:, None].to(x.dtype)
        return norm(x) if qk_norm == "post_rope" else x

    q = finished(q, q_norm_weight, cos, sin)
    keys = torch.cat([finished(k, k_norm_weight, cos, sin), finished(image_k, k_norm_weight, image_cos, image_sin)])
    group_size = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group_size, dim=1) for x in (keys, torch.cat([v, image_v])))
    scores = q.transpose(0, 1) @ keys.permute(1, 2, 0) * (softmax_scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~_visible(layout), float("-inf"))
    out = (scores.softmax(-1) @ values.transpose(0, 1)).transpose(0, 1)
    return (out, torch.logsumexp(scores, dim=-1).T) if return_lse else out


def _visible(layout: AttentionLayout) -> Tensor:
    """Who sees whom among all samples, bool (T, T + N)."""
    tokens = [(b, t) for b, length in enumerate(layout.text_lengths) for t in range(length)]
    patches = [
        (b, offset)
        for b, (lengths, offsets) in enumerate(zip(layout.image_lengths, layout.image_offsets, strict=True))
        for length, offset in zip(lengths, offsets, strict=True)
        for _ in range(length)
    ]
    queries, keys = (torch.tensor(x, dtype=torch.int64).view(-1, 2) for x in (tokens, tokens + patches))
    same_sample = queries[:, None, 0] == keys[None, :, 0]
    return (same_sample & (keys[None, :, 1] <= queries[:, None, 1])).to(layout.device)


def assert_equal_results(actual: Results, expected: Results, *, tolerance: float = 1e-10) -> None:
    """Assert that every result is there and within ``tolerance`` of the expected one, relative to its largest value."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].shape == x.shape, name
        bound = tolerance * max(1.0, _largest(x))
        assert _largest(actual[name] - x) <= bound, f"{name}: {_largest(actual[name] - x):.3g} > {bound:.3g}"


def pooled(draws: Sequence[Results]) -> Results:
    """Results of several draws as those of one, flat: over few numbers plain code may be nearly exact by luck."""
    return {name: torch.cat([draw[name].flatten() for draw in draws]) for name in draws[0]}


ATOL = {torch.bfloat16: 1e-4, torch.float16: 1e-5, torch.float32: 1e-6}
"""Allowance for results that the plain code happens to hit almost exactly."""
RMS_RATIO = {torch.bfloat16: 0.005, torch.float16: 0.001, torch.float32: 1e-6}
"""RMS of the error over RMS of the result, for outputs; gradients get twice as much."""


def assert_as_exact(actual: Results, plain: Results, exact: Results, dtype: torch.dtype) -> None:
    """Assert that the error against float64 is at most 2 (gradients: 3) times that of plain code in the same dtype.

    The root mean square of the error is bounded besides, relative to the result's.
    """
    assert actual.keys() == plain.keys() == exact.keys()
    for name, expected in exact.items():
        gradient = name.startswith("grad")
        error = actual[name].double() - expected
        bound = (3 if gradient else 2) * _largest(plain[name].double() - expected) + ATOL[dtype]
        assert _largest(error) <= bound, f"{name}: largest error {_largest(error):.3g} > {bound:.3g}"
        limit = (2 if gradient else 1) * RMS_RATIO[dtype] * _rms(expected)
        assert _rms(error) <= limit, f"{name}: RMS error {_rms(error):.3g} > {limit:.3g}"


def _largest(x: Tensor) -> float:
    """Largest absolute value; NaN if any is."""
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def draw_layout(integer: Callable[[int, int], int], *, device: torch.device | str = "cpu") -> AttentionLayout:
    """A tiny layout from draws of ``integer(low, high)``: a hypothesis strategy's, or ``random.Random(0).randint``."""
    text_lengths = [integer(0, 5) for _ in range(integer(0, 4))]
    image_lengths = [[integer(1, 4) for _ in range(integer(0, 3))] for _ in text_lengths]
    image_offsets = [
        sorted(integer(0, length) for _ in images) for length, images in zip(text_lengths, image_lengths, strict=True)
    ]
    return AttentionLayout.build(text_lengths, image_lengths, image_offsets, device=device)


def padded_cache(packed: Tensor, lengths: Sequence[int], capacity: int) -> Tensor:
    """Packed keys (T, G, K) as a cache (B, capacity, G, K) with NaN in every row past a sample's length."""
    cache = packed.new_full((len(lengths), capacity, *packed.shape[1:]), float("nan"))
    for line, rows in zip(cache, packed.split(list(lengths)), strict=True):
        line[: len(rows)] = rows
    return cache
