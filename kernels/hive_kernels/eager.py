"""A registered op and its gradient, called without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
