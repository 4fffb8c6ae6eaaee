"""What our ops of torch.library share: a call that is fast without a compiler, and the count of their FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def differentiable(op: Any, save: Callable[..., None], differentiate: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` with the gradient that is registered for it, faster in eager mode.

    torch.library looks up every argument's default at every call that needs a gradient: 0.1 ms for an op of 23
    arguments. And it records gradients in Python even where none are asked for, which the call here steps over.

    Args:
        op: of torch.library.
        save: as ``setup_context`` of its ``register_autograd``.
        differentiate: its backward.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            save(ctx, inputs, output)
            return output

        backward = staticmethod(differentiate)

    def call(*inputs: Any) -> Any:
        return op(*inputs) if torch.compiler.is_compiling() else Eager.apply(*inputs)  # type: ignore[no-untyped-call]

    return call


def count_flops(op: Any, gradient: Any) -> None:
    """Let PyTorch's counter know an op of (., H, ..., K) queries, and its gradient; their last arguments are the pairs.

    4 H K pairs forward: two matrix products, a multiplication and an addition each; 10 backward: five products, however
    many the kernels do.
    """
    for which, factor in ((op, 4), (gradient, 10)):

        def count(first: tuple[int, ...], *rest: Any, factor: int = factor, **_: Any) -> int:
            return factor * first[1] * first[-1] * rest[-1]

        register_flop_formula(which)(count)
