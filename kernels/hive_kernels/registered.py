"""The kernels as ops of torch.library: fake implementations, gradients, floating-point operations.

``torch.ops.hive_ds.hierarchical_attention`` takes what `KernelArguments` lists and returns (out, lse).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import KernelArguments
from .library import count_flops, differentiable

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


def _backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    from .triton_launch import backward

    return backward(KernelArguments(*arguments), out, lse, dout, dlse)


_library = torch.library.Library("hive_ds", "FRAGMENT")


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An op that the dispatcher calls directly: through `torch.library.custom_op` a call costs 40 us more."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, torch.compiler.disable(kernel), key)
    torch.library.register_fake(f"hive_ds::{name}", fake, lib=_library)
    return getattr(torch.ops.hive_ds, name).default


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    q = arguments[0]
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    a = KernelArguments(*arguments)
    width = 0 if a.qk_norm == "none" else a.q.shape[-1]
    inputs = [x.new_empty(x.shape) for x in (a.q, a.k, a.v, a.image_k, a.image_v)]
    return inputs + [a.q.new_empty(width, dtype=torch.float32) for _ in "qk"]


attention_op = _define("hierarchical_attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
gradient_op = _define(
    "hierarchical_attention_backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor[]",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output)
    ctx.numbers = inputs[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)  # zeros for a lse that nothing depends on would be one launch a layer


@once_differentiable  # the op of the gradient has none, and torch would make it zeros
def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    gradients: list[Tensor | None] = list(gradient_op(dout, dlse, out, lse, *tensors, *ctx.numbers))
    for place in (5, 6):
        weight, gradient = tensors[place], gradients[place]
        gradients[place] = None if weight is None or gradient is None else gradient.to(weight.dtype)
    return (*gradients, *[None] * (_NUM_ARGUMENTS - _NUM_GRADIENTS))


torch.library.register_autograd(attention_op, _differentiate, setup_context=_save, lib=_library)
attend = differentiable(attention_op, _save, _differentiate)
"""The op, as calls outside of torch.library's own machinery take it."""

count_flops(torch.ops.hive_ds.hierarchical_attention, torch.ops.hive_ds.hierarchical_attention_backward)
