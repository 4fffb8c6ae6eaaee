"""The ways to compute hierarchical attention that are timed against each other, all over the same span.

The span goes from projected q, k, v, image_k and image_v, before norm and rotation, to the attention output. What a
model does once a batch for all layers (masks, index tables, padding the batch) is done before the clock starts. While
decoding, keys come finished and joined: a cache keeps them so.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hive_ds.kernels import hierarchical_attention
from hive_ds.kernels.testing import padded_cache

from .case import Arguments, Case
from .joining import Gather, Varlen
from .padded_peers import DenseMask, Flex, FlexRebuilt
from .peer import EPS, Peer
from .varlen import Plans, backend_name, flash_forward, merge, merged_attention, varlen_attention


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
        return "triton" if runs else "auto"

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
