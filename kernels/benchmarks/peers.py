"""The ways to compute hierarchical attention that are timed against each other, all over the same span.

The span goes from projected q, k, v, image_k and image_v, before norm and rotation, to the attention output. What a
model does once a batch for all layers (masks, index tables, padding the batch) is done before the clock starts. While
decoding, keys come finished and joined: a cache keeps them so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hive_ds.kernels import AttentionLayout, checks, hierarchical_attention
from hive_ds.kernels.finish import finish
from hive_ds.kernels.padding import Padding
from hive_ds.kernels.testing import padded_cache

from .case import Arguments, Case
from .joining import Gather, Varlen, first_queries
from .varlen import Plans, backend_name, flash_forward, merge, merged_attention, varlen_attention

EPS = 1e-6
Function = TypeVar("Function", bound=Callable[..., Any])


class Peer:
    """One implementation, made for one case."""

    name: str
    label: str

    def __init__(self, case: Case) -> None:
        self.case, self.layout, self.shape = case, case.layout, case.shape

    @property
    def detail(self) -> str:
        """Which library does the work, where that depends on the machine."""
        return ""

    @property
    def graphed(self) -> bool:
        """Whether it is timed as a CUDA graph."""
        return True

    def refuses(self, direction: str) -> str | None:
        """Why it cannot do ``direction`` here; None if it can."""
        return None

    def native(self, arguments: Arguments) -> Arguments:
        """The arguments in the form in which a model built on this peer would have them. Not timed."""
        return arguments

    def native_output(self, out: Tensor) -> Tensor:
        """A packed output, or its cotangent, in this peer's form. Not timed."""
        return out

    def packed(self, name: str, x: Tensor) -> Tensor:
        """An output ("out") or a gradient (by argument name) of this peer, packed."""
        return x

    def __call__(self, a: Arguments) -> Tensor:
        """The attention output. Timed."""
        raise NotImplementedError

    def finished(self, a: Arguments, name: str) -> Tensor:
        """q, k or image_k of ``a``, packed, normed and rotated."""
        weight = a["q_norm_weight" if name == "q" else "k_norm_weight"]
        prefix = "image_" if name == "image_k" else ""
        return finish(a[name], weight, EPS, self.shape.qk_norm, a[f"{prefix}cos"], a[f"{prefix}sin"])

    def compiled(self, function: Function) -> Function:
        """``function``, compiled on a GPU; on a CPU compiling would take longer than all the tiny shapes."""
        return cast(Function, torch.compile(function, dynamic=False)) if self.case.device.type == "cuda" else function


class Ours(Peer):
    """`hierarchical_attention` as a model calls it."""

    name, label = "hive", "hive_ds.kernels"

    @property
    def detail(self) -> str:
        if self._backend != "triton":
            return "batched"
        return "triton" if self.case.device.type == "cuda" else "triton, interpreted"

    @property
    def _backend(self) -> str:
        runs = self.case.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        return "triton" if runs and "triton" in checks.BACKENDS else "auto"

    def native(self, arguments: Arguments) -> Arguments:
        if not self.shape.decode:
            return arguments
        lengths = self.layout.text_lengths
        return arguments | {n: padded_cache(arguments[n], lengths, max(lengths) + 16) for n in ("k", "v")}

    def __call__(self, a: Arguments) -> Tensor:
        out = hierarchical_attention(
            **a, layout=self.layout, norm_eps=EPS, qk_norm=self.shape.qk_norm, backend=self._backend
        )
        assert isinstance(out, Tensor)
        return out


class Reference(Ours):
    """The plain reference: one sample after the other, in fp32."""

    name, label = "reference", "our reference"
    graphed, detail = False, ""
    _backend = "reference"


class _Padded(Peer):
    """What works on rectangles: images before text in one key tensor, (B, tokens, heads, K)."""

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
        blank = torch.zeros(seen.shape, dtype=case.dtype, device=case.device)
        self.mask = blank.masked_fill(~seen, float("-inf"))[:, None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class Flex(_Padded):
    """Compiled FlexAttention with a block mask built once a batch."""

    name, label = "flex", "FlexAttention, mask prebuilt"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._flex = self.compiled(flex_attention)
        self._build = self.compiled(create_block_mask)
        # One image at one offset in all samples needs no table, and one mask for the whole batch. Made once: a new
        # function at every call would be compiled anew.
        self._alike = len(self.shape.offsets) == 1
        self._visible = self._arithmetic() if self._alike else self._lookup()
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


class VarlenFlash(Peer):
    """Keys in media order, queries cut where an image begins to be seen: variable-length flash attention."""

    name, label = "varlen", "concat + varlen flash attention"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.plan = Varlen.joint(self.layout)
        self.backend = backend_name(case.device, case.dtype)
        self._join = self.compiled(self._joined)

    @property
    def detail(self) -> str:
        return self.backend

    def native(self, arguments: Arguments) -> Arguments:
        if not self.shape.decode:
            return arguments
        joined = {name: self._gathered(arguments[name], arguments[f"image_{name}"]) for name in ("k", "v")}
        return {name: x for name, x in arguments.items() if not name.startswith("image")} | joined

    def __call__(self, a: Arguments) -> Tensor:
        q, k, v = self._join(a)
        return varlen_attention(q, k, v, self.plan, self.backend)

    def _joined(self, a: Arguments) -> tuple[Tensor, ...]:
        q = self.finished(a, "q")
        if self.shape.decode:
            return q, a["k"], a["v"]
        k = self._gathered(self.finished(a, "k"), self.finished(a, "image_k"))
        return q, k, self._gathered(a["v"], a["image_v"])

    def _gathered(self, text: Tensor, image: Tensor) -> Tensor:
        both = torch.cat([text, image])
        return both if self.plan.gather is None else Gather.apply(both, *self.plan.gather)


class Merged(Peer):
    """One flash call over the text keys and one over the image keys, merged by their log-sum-exp: no concatenation."""

    name, label = "merged", "text call + image call, merged by log-sum-exp"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        flash = case.device.type == "cuda" and case.dtype in (torch.bfloat16, torch.float16)
        self.plans = Plans(Varlen.text(self.layout), Varlen.image(self.layout), flash)
        self._prepare = self.compiled(self._prepared)

    @property
    def detail(self) -> str:
        return f"torch {torch.__version__} flash" if self.plans.forward is flash_forward else "loops"

    def native(self, arguments: Arguments) -> Arguments:
        if not self.shape.decode:
            return arguments
        return arguments | {name: self._image(arguments[name]) for name in ("image_k", "image_v")}

    def __call__(self, a: Arguments) -> Tensor:
        if not self.shape.decode:
            q, k, image_k, image_v = self._prepare(a)
            return merged_attention(q, k, a["v"], image_k, image_v, self.plans)
        (q,) = self._prepare(a)
        text = self.plans.forward(q, a["k"], a["v"], self.plans.text, causal=True)
        image = self.plans.forward(q, a["image_k"], a["image_v"], self.plans.image, causal=False)
        return merge(*text, *image)[0]

    def _prepared(self, a: Arguments) -> tuple[Tensor, ...]:
        q = self.finished(a, "q")
        if self.shape.decode:
            return (q,)
        return q, self.finished(a, "k"), self._image(self.finished(a, "image_k")), self._image(a["image_v"])

    def _image(self, x: Tensor) -> Tensor:
        return x if self.plans.image.gather is None else Gather.apply(x, *self.plans.image.gather)


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Ours, DenseMask, Flex, FlexRebuilt, VarlenFlash, Merged, Reference)
}


def visible_pairs(layout: AttentionLayout) -> int:
    """(query, key) pairs of a layout without decoding, counted from `first_queries`: a second way to `Shape.pairs`."""
    first = first_queries(layout)
    lengths = torch.tensor(layout.text_lengths)
    position = torch.arange(layout.max_text)
    seen = first[:, None, :] <= position[:, None]
    return int((seen & (position < lengths[:, None])[:, :, None]).sum())
