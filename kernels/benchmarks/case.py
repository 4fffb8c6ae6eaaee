"""Inputs of one shape, in as many copies as it takes to keep them out of the L2 cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout

from .shapes import Shape

Arguments = dict[str, Any]
"""Tensors of one call of `hierarchical_attention`, by argument name."""

TABLES = ("cos", "sin", "image_cos", "image_sin")


@dataclass
class Case:
    """One shape on one device: its layout, and copies of random arguments with a cotangent each."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    layout: AttentionLayout = field(init=False)
    shared: dict[str, Any] = field(default_factory=dict)
    """What peers of one kind have in common: compiled functions, which take seconds each."""

    def __post_init__(self) -> None:
        self.layout = self.shape.layout(self.device)

    @cached_property
    def copies(self) -> list[tuple[Arguments, Tensor]]:
        """(arguments, cotangent of the output) of every copy."""
        return [self.draw(seed) for seed in range(self.num_copies)]

    @property
    def num_copies(self) -> int:
        """As many that going around them reads three times the L2 before any comes again."""
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(16, max(2, 1 + math.ceil(3 * cache / self.shape.work("forward", self.dtype).bytes)))

    def draw(self, seed: int) -> tuple[Arguments, Tensor]:
        """Arguments and a cotangent of the output."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape, layout = self.shape, self.layout
        wide = torch.promote_types(self.dtype, torch.float32)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=self.device)

        def heads(rows: int, count: int) -> Tensor:
            return normal(rows, count, shape.head_dim).to(self.dtype)

        arguments = {"q": heads(layout.num_queries, shape.heads)}
        for name, rows in (("k", layout.num_text), ("v", layout.num_text)):
            arguments[name] = heads(rows, shape.groups)
        for name in ("image_k", "image_v"):
            arguments[name] = heads(layout.num_image, shape.groups)
        arguments["q_norm_weight"] = 1 + 0.3 * normal(shape.head_dim).to(wide)
        if not shape.decode:
            arguments["k_norm_weight"] = 1 + 0.3 * normal(shape.head_dim).to(wide)
        for prefix, rows in (("", layout.num_queries), ("image_", layout.num_image)):
            if prefix and shape.decode:
                continue
            angle = 3 * normal(rows, shape.head_dim // 2).to(wide)
            arguments |= {f"{prefix}cos": angle.cos(), f"{prefix}sin": angle.sin()}
        return arguments, heads(layout.num_queries, shape.heads)


def require_gradients(arguments: Arguments) -> list[Tensor]:
    """The leaves among ``arguments``, marked so: everything but the rotation tables, in the order of the call."""
    return [x.requires_grad_() for name, x in arguments.items() if name not in TABLES]
