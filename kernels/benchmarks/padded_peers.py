"""Peers that work on rectangles: images before text in one key tensor, (B, tokens, heads, K)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hive_ds.kernels.padding import Padding

from .case import Arguments, Case
from .joining import first_queries
from .peer import Peer


class _Padded(Peer):
    """What all of them share."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.count = self.layout.num_samples
        self._join = self.compiled(self._joined)
        self.first = first_queries(self.layout)
        self.first_query = self.layout.max_text - self.layout.max_queries
        self.num_image = sum(self.shape.images)

    def native(self, arguments: Arguments) -> Arguments:
        native = {name: self._rows(name).pad(x) if self._is_rows(name) else x for name, x in arguments.items()}
        if self.shape.decode:
            for text, image in (("k", "image_k"), ("v", "image_v")):
                native[text] = torch.cat([native.pop(image), native[text]], dim=1)
        return native

    def native_output(self, out: Tensor) -> Tensor:
        return self.layout.query_rows.pad(out)

    def packed(self, name: str, x: Tensor) -> Tensor:
        return self._rows(name).unpad(x) if self._is_rows(name) else x

    def __call__(self, a: Arguments) -> Tensor:
        q, k, v = self._join(a)
        return self._attend(q, k, v).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    repeated = False
    """Whether keys are spelled out for every query head."""

    def _joined(self, a: Arguments) -> tuple[Tensor, ...]:
        flat = {name: x.flatten(0, 1) if self._is_rows(name) else x for name, x in a.items()}
        q = self.finished(flat, "q").unflatten(0, (self.count, -1))
        if self.shape.decode:
            k, v = a["k"], a["v"]
        else:
            image_k, k = (self.finished(flat, name).unflatten(0, (self.count, -1)) for name in ("image_k", "k"))
            k, v = torch.cat([image_k, k], dim=1), torch.cat([a["image_v"], a["v"]], dim=1)
        if self.repeated:
            k, v = (x.repeat_interleave(self.shape.heads // self.shape.groups, dim=2) for x in (k, v))
        return tuple(x.transpose(1, 2) for x in (q, k, v))

    def _rows(self, name: str) -> Padding:
        if name.startswith("image"):
            return self.layout.image_rows
        if name in ("k", "v"):
            return self.layout.text_rows
        return self.layout.query_rows

    @staticmethod
    def _is_rows(name: str) -> bool:
        return not name.endswith("weight")


class DenseMask(_Padded):
    """Concatenated keys, heads repeated, an additive mask: what the paper's published code does."""

    name, label = "sdpa", "concat + dense mask + SDPA"
    repeated = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        position = torch.arange(self.first_query, self.layout.max_text, device=case.device)
        seen = self.first[:, None, :] <= position[:, None]
        # Rows a multiple of 16 apart: SDPA would copy another mask at every call.
        padding = -seen.shape[-1] % 16
        blank = torch.zeros(*seen.shape[:-1], seen.shape[-1] + padding, dtype=case.dtype, device=case.device)
        self.mask = blank[..., : seen.shape[-1]].masked_fill_(~seen, float("-inf"))[:, None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class Flex(_Padded):
    """Compiled FlexAttention with a block mask built once a batch."""

    name, label = "flex", "FlexAttention, mask prebuilt"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        # One image at one offset in all samples needs no table, and one mask for the whole batch.
        self._alike = len(self.shape.offsets) == 1
        if "flex" not in case.shared:
            # A new mask function at every call would be compiled anew.
            visible = self._arithmetic() if self._alike else self._lookup()
            case.shared["flex"] = (self._join, self.compiled(flex_attention), self.compiled(create_block_mask), visible)
        self._join, self._flex, self._build, self._visible = case.shared["flex"]
        self._block_mask = self._new_mask()

    def refuses(self, direction: str) -> str | None:
        backward = direction != "forward" and self.case.device.type == "cpu"
        return "FlexAttention has no backward on a CPU" if backward else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._flex(q, k, v, block_mask=self._block_mask, enable_gqa=True)

    def _new_mask(self) -> BlockMask:
        sizes = (self.layout.max_queries, self.num_image + self.layout.max_text)
        return self._build(self._visible, None if self._alike else self.count, None, *sizes, self.case.device)

    def _arithmetic(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        num_image, offset, first = self.num_image, self.shape.offsets[0], self.first_query

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return torch.where(key < num_image, query + first >= offset, query + first >= key - num_image)

        return visible

    def _lookup(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        table, first = self.first, self.first_query

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query + first >= table[b, key]

        return visible


class FlexRebuilt(Flex):
    """The same with a new block mask for every call, as where one layer's call is all there is."""

    name, label = "flex-rebuilt", "FlexAttention, mask rebuilt"

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._block_mask = self._new_mask()
        return super()._attend(q, k, v)
