"""What one call of the kernels reads, in the order in which the registered op hands it over."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .tiles import SHORT_ROWS, Tile, architecture_of, choose_tile


class KernelArguments(NamedTuple):
    """Tensors as in `hierarchical_attention` (no image is an empty tensor), tables in halves, the layout's tables.

    No properties: torch.compile of torch 2.9 does not follow those of a named tuple.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    image_k: Tensor
    image_v: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    image_cos: Tensor | None
    image_sin: Tensor | None
    samples: Tensor
    seen: Tensor
    first_token: Tensor
    row_work: Tensor
    backward_work: Tensor
    key_work: Tensor
    scale: float
    eps: float
    qk_norm: str
    decoding: bool
    """Whether keys come finished."""
    max_rows: int
    """Query rows of the sample that has most: its tokens times the heads of a group."""
    pairs: int
    """Visible (query, key) pairs, of one head."""

    def groups(self) -> int:
        """Key/value heads."""
        return self.k.shape[-2]

    def fused(self) -> bool:
        """Whether the forward kernel norms and rotates keys itself: where few programs read each."""
        return not self.decoding and self.max_rows <= SHORT_ROWS

    def one_pass(self) -> bool:
        """Whether one program of the backward kernel takes all rows of a sample and group."""
        most = self.tile("backward short").rows
        return most > 0 and self.max_rows <= most

    def forward_tile(self) -> Tile:
        """Launch settings of the forward kernel."""
        kind = "forward short" if self.fused() else "forward"
        return self.tile("decode" if self.decoding and self.max_rows <= self.tile("decode").rows else kind)

    def tile(self, kind: str) -> Tile:
        """Launch settings of a kernel."""
        return choose_tile(architecture_of(self.q.device), self.q.shape[-1], kind, self.q.dtype)
