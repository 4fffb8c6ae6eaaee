"""The kernels as ops of torch.library: fake implementations, gradients, floating-point operations.

``torch.ops.hive_ds.hierarchical_attention`` takes what `KernelArguments` lists and returns (out, lse).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .arguments import KernelArguments
from .eager import differentiable

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor image_k, Tensor image_v, Tensor? q_weight, Tensor? k_weight, "
    "Tensor? cos, Tensor? sin, Tensor? image_cos, Tensor? image_sin, Tensor samples, Tensor seen, Tensor first_token, "
    "Tensor row_work, Tensor backward_work, Tensor key_work, float scale, float eps, str qk_norm, bool decoding, "
    "SymInt max_rows, SymInt pairs"
)
_NUM_ARGUMENTS = _ARGUMENTS.count(",") + 1
_NUM_TENSORS = _ARGUMENTS.count("Tensor")
_NUM_GRADIENTS = 7


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from .triton_launch import forward  # torch's wheels for CPUs come without Triton

    return forward(KernelArguments(*arguments))


def _backward(dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    from .triton_launch import backward

    return backward(KernelArguments(*arguments), out, lse, dout, dlse)


attention_op = torch.library.custom_op(
    "hive_ds::hierarchical_attention", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
gradient_op = torch.library.custom_op(
    "hive_ds::hierarchical_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor dlse, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor[]",
)


@attention_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    q = arguments[0]
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@gradient_op.register_fake
def _(dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    a = KernelArguments(*arguments)
    width = 0 if a.qk_norm == "none" else a.q.shape[-1]
    inputs = [x.new_empty(x.shape) for x in (a.q, a.k, a.v, a.image_k, a.image_v)]
    return inputs + [a.q.new_empty(width, dtype=torch.float32) for _ in "qk"]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output)
    ctx.numbers = inputs[_NUM_TENSORS:]


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    gradients: list[Tensor | None] = list(gradient_op(dout, dlse, out, lse, *tensors, *ctx.numbers))
    for place in (5, 6):
        weight, gradient = tensors[place], gradients[place]
        gradients[place] = None if weight is None or gradient is None else gradient.to(weight.dtype)
    return (*gradients, *[None] * (_NUM_ARGUMENTS - _NUM_GRADIENTS))


attention_op.register_autograd(_differentiate, setup_context=_save)
attend = differentiable(attention_op, _save, _differentiate)
"""The op, as calls outside of torch.library's own machinery take it."""


@register_flop_formula(torch.ops.hive_ds.hierarchical_attention)
def _(*arguments: Any, **_: Any) -> int:
    """4 H K pairs: two matrix products, a multiplication and an addition each."""
    _, heads, head_dim = arguments[0]
    return 4 * heads * head_dim * arguments[_NUM_ARGUMENTS - 1]


@register_flop_formula(torch.ops.hive_ds.hierarchical_attention_backward)
def _(*arguments: Any, **_: Any) -> int:
    """10 H K pairs: five matrix products, however many the kernels do."""
    _, heads, head_dim = arguments[4]
    return 10 * heads * head_dim * arguments[_NUM_ARGUMENTS + 3]
