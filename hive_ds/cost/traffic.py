"""FLOPs and bytes of a step by part of the model: what a roofline is drawn from.

Counted on the meta device, operator by operator, forward and backward: each reads its tensors from memory once and
writes its results once. That is what PyTorch does without fusion, caches aside. ``fused`` leaves out all operators
that neither multiply matrices nor attend, as if each were fused into one of those: no compiler does better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hive_ds.cost.counted import run_step
from hive_ds.cost.workload import Workload
from hive_ds.model.attention_backends import TrainedModel

PARTS = ("encoder", "projectors", "LLM", "attention of the LLM", "head and loss", "other")
_OWNERS = {"vision_encoder": "encoder", "projectors": "projectors", "projector": "projectors"}
_OWNERS |= {"layers": "LLM", "norm": "LLM", "embed_tokens": "LLM", "lm_head": "head and loss"}
_OWNERS |= {"language_loss": "head and loss"}
"""By component of a module's name; the first that is known decides."""
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view", "alias")
"""Operators that move nothing, beside views."""


@dataclass
class Traffic:
    """What a part asks for in a micro-batch."""

    flops: float = 0.0
    """Of matrix products and attention, on hardware: repeated work included."""
    bytes: float = 0.0
    """Read and written by all operators."""
    fused: float = 0.0
    """Of those, by operators that have FLOPs."""


def count_traffic(model: TrainedModel, workload: Workload) -> dict[str, Traffic]:
    """Count a micro-batch of ``model``, on the meta device with its stage planned, by `PARTS`."""
    with TrafficWatch(model) as watch:
        run_step(model, workload)
    return watch.parts


class TrafficWatch(TorchDispatchMode):
    """Count inside a ``with`` block, into ``parts``; a gradient counts to the part whose forward pass asks for it.

    Args:
        model: whose modules are told apart by their names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = {part: Traffic() for part in PARTS}
        self._part_of = {module: part for name, module in model.named_modules() if (part := _owner(name))}
        self._entered: list[str] = []
        self._nodes: dict[int, str] = {}
        """Number of each node of autograd's graph -> part that made it."""

    def __enter__(self) -> TrafficWatch:
        self._hooks = []
        for module, part in self._part_of.items():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self._entered.append(part)))
            leave = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
            self._hooks.append(leave)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self._part()
        result = func(*args, **(kwargs or {}))
        if not _moves_nothing(func):
            attends = name == "LLM" and func.namespace == "hive_ds"
            part = self.parts["attention of the LLM" if attends else name]
            moved = _bytes(args, kwargs) + _bytes(result)
            part.bytes += moved
            formula = flop_registry.get(func._overloadpacket)
            if formula is not None:
                part.flops += formula(*args, **(kwargs or {}), out_val=result)
                part.fused += moved
        return result

    def _leave(self) -> None:
        self._entered.pop()

    def _part(self) -> str:
        node = torch._C._current_autograd_node()
        if self._entered:
            if node is None:  # the node of this operator is the last that was made
                self._nodes.setdefault(torch._C._autograd._get_sequence_nr() - 1, self._entered[-1])
            return self._entered[-1]
        return "other" if node is None else self._nodes.get(node._sequence_nr(), "other")


def _owner(name: str) -> str | None:
    return next((_OWNERS[word] for word in name.split(".") if word in _OWNERS), None)


def _moves_nothing(func: Any) -> bool:
    returns = func._schema.returns
    view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    return view or func._overloadpacket.__name__ in _FREE


def _bytes(*values: Any) -> int:
    """Of all tensors in ``values``; of an expanded one, what is stored."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return sum(min(one.numel() * one.element_size(), one.untyped_storage().nbytes()) for one in tensors)
