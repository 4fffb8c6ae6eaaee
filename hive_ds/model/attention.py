"""Self-attention of an LLM layer that can also attend to image keys.

Every layer's attention is replaced by `HiveAttention`: a routed one sees text and image keys in one softmax, an
un-routed one is the LLM's own attention over packed text. Projections keep their Hugging Face names.
Axes: T text token, N image token, D model, H query head, G key/value head, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hive_ds.kernels import (
    AttentionLayout,
    KernelTables,
    finish_keys,
    hierarchical_attention,
    prepare_layout,
    prepared_attention,
)
from hive_ds.model.flash import FLASH_BACKENDS, TextBounds, flash_attention

if TYPE_CHECKING:
    from hive_ds.model.cache import HiveCache


@dataclass
class AttentionCall:
    """What one forward pass hands a layer's attention, beside the hidden states.

    Not frozen: torch.compile guards on every field of a frozen dataclass, down to the lists of the layout, and compiles
    anew when one changes.

    Attributes:
        layout: who sees whom, shared by all layers with the same number of routes.
        cos_TK, sin_TK: rotation of the text, fp32 halves (T, K/2).
        image_ND: (N, D) normed image states of this layer; None at an un-routed layer or when the cache has the keys.
        image_cos_NK, image_sin_NK: rotation of the image keys, fp32 halves (N, K/2); None with ``image_ND``.
        cache: where keys are kept between calls, or None.
        texts: where the texts are, for an un-routed layer that a library's flash attention serves.
        tables: what the kernels read of the layout, for a layer that is compiled.
        text_TD, rows_R: for a layer of which only some tokens are wanted (`hive_ds.model.last_layer`): the normed
            states of all tokens, and the rows of the wanted ones (R,), which are then the layer's whole input.
    """

    layout: AttentionLayout
    cos_TK: Tensor
    sin_TK: Tensor
    image_ND: Tensor | None = None
    image_cos_NK: Tensor | None = None
    image_sin_NK: Tensor | None = None
    cache: HiveCache | None = None
    texts: TextBounds | None = None
    tables: KernelTables | None = None
    text_TD: Tensor | None = None
    rows_R: Tensor | None = None


class HeadRMSNorm(nn.Module):
    """Weight and epsilon of an RMSNorm over the head dim; the attention op applies it."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.variance_epsilon = eps


class HiveAttention(nn.Module):
    """Attention of one LLM layer, built around the layer's own projections."""

    q_proj: Any
    k_proj: Any
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: Any
    k_norm: Any
    image_k_proj: nn.Module
    image_v_proj: nn.Module

    def __init__(
        self, attention: Any, layer: int, *, routed: bool, image_kv: str, qk_norm: str, eps: float, backend: str
    ) -> None:
        """Take over the projections of ``attention``.

        Args:
            attention: the LLM layer's attention (q/k/v/o projections, perhaps q_norm and k_norm).
            layer: its index in the LLM.
            routed: whether image keys reach this layer.
            image_kv: ``"own"`` gives a routed layer image_k_proj and image_v_proj; ``"shared"`` uses k_proj and v_proj.
            qk_norm: norm added at a routed layer whose LLM has none: ``none``, ``pre_rope`` or ``post_rope``.
            eps: epsilon of that norm.
            backend: backend of `hierarchical_attention`; at an un-routed layer also one of `FLASH_BACKENDS`, which
                serve whole texts and leave steps with a cache to "auto".
        """
        super().__init__()
        self.layer, self.routed = layer, routed
        self.head_dim: int = attention.head_dim
        self.softmax_scale: float = attention.scaling
        self.backend = backend
        self.prepared = False
        """Whether the kernels' tables are made outside, once a batch: see `hive_ds.model.compiling`."""
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.qk_norm = "none"
        if hasattr(attention, "q_norm"):
            self.qk_norm = "pre_rope"
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        elif routed and qk_norm != "none":
            self.qk_norm = qk_norm
            self.q_norm, self.k_norm = HeadRMSNorm(self.head_dim, eps), HeadRMSNorm(self.head_dim, eps)
        if routed and image_kv == "own":
            self.image_k_proj, self.image_v_proj = _linear_like(self.k_proj), _linear_like(self.v_proj)

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters that `forward` reads without calling the child that holds them (ZeRO-3 must know)."""
        return [] if self.qk_norm == "none" else [self.q_norm.weight, self.k_norm.weight]

    @property
    def is_flash(self) -> bool:
        """Whether a library's flash attention serves whole texts."""
        return self.backend in FLASH_BACKENDS

    def shared_fields(self, layout: AttentionLayout, dtype: torch.dtype) -> dict[str, Any]:
        """Fields of `AttentionCall` that all layers of this kind share on a batch of whole texts, made once for it."""
        if self.is_flash:
            return {"texts": TextBounds.of(layout)}
        if not self.prepared:
            return {}
        heads, groups = (proj.out_features // self.head_dim for proj in (self.q_proj, self.k_proj))
        tables = prepare_layout(layout, heads=heads, groups=groups, head_dim=self.head_dim, dtype=dtype)
        return {"tables": tables}

    def copy_image_projections(self) -> None:
        """Set image_k_proj and image_v_proj to k_proj and v_proj, biases included."""
        self.image_k_proj.load_state_dict(self.k_proj.state_dict())
        self.image_v_proj.load_state_dict(self.v_proj.state_dict())

    # The LLM's decoder layer also passes what its own attention wants (masks, position ids): `unused`.
    def forward(self, hidden_states: Tensor, *, hive: AttentionCall, **unused: object) -> tuple[Tensor, None]:
        """(1, T, D) packed text -> (1, T, D), or (1, R, D) where the call asks for R tokens; no attention weights."""
        x_TD = hidden_states.squeeze(0) if hive.text_TD is None else hive.text_TD
        q_THK, k_TGK, v_TGK = (self._heads(proj, x_TD) for proj in (self.q_proj, self.k_proj, self.v_proj))
        image_k, image_v = self._image_keys(hive)
        if hive.cache is None:
            out_THK = self._attend(q_THK, k_TGK, v_TGK, image_k, image_v, hive)
        else:
            out_THK = self._attend_cached(q_THK, k_TGK, v_TGK, image_k, image_v, hive)
        if hive.rows_R is not None:
            out_THK = out_THK.index_select(0, hive.rows_R)
        return self.o_proj(out_THK.flatten(1))[None], None

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (-1, self.head_dim))

    def _image_keys(self, hive: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
        """Projected image keys and values, (N, G, K) each, before norm and rotation."""
        if hive.image_ND is None:
            return None, None
        own = hasattr(self, "image_k_proj")
        k_proj, v_proj = (self.image_k_proj, self.image_v_proj) if own else (self.k_proj, self.v_proj)
        return self._heads(k_proj, hive.image_ND), self._heads(v_proj, hive.image_ND)

    def _norm(self) -> tuple[Tensor | None, Tensor | None, float]:
        if self.qk_norm == "none":
            return None, None, 1e-6
        return self.q_norm.weight, self.k_norm.weight, self.q_norm.variance_epsilon

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, image_k: Tensor | None, image_v: Tensor | None, hive: AttentionCall
    ) -> Tensor:
        q_weight, k_weight, eps = self._norm()
        if hive.texts is not None:
            q = finish_keys(q, q_weight, eps, self.qk_norm, hive.cos_TK, hive.sin_TK)
            k = finish_keys(k, k_weight, eps, self.qk_norm, hive.cos_TK, hive.sin_TK)
            return flash_attention(self.backend, q, k, v, hive.texts, self.softmax_scale)
        options: dict[str, Any] = dict(
            q_norm_weight=q_weight, k_norm_weight=k_weight, norm_eps=eps, qk_norm=self.qk_norm,
            cos=hive.cos_TK, sin=hive.sin_TK, image_cos=hive.image_cos_NK, image_sin=hive.image_sin_NK,
            softmax_scale=self.softmax_scale,
        )  # fmt: skip
        if hive.tables is not None:
            return prepared_attention(q, k, v, image_k, image_v, hive.tables, **options)
        out = hierarchical_attention(q, k, v, image_k, image_v, hive.layout, backend=self.backend, **options)
        return cast(Tensor, out)  # without lse

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, image_k: Tensor | None, image_v: Tensor | None, hive: AttentionCall
    ) -> Tensor:
        """Finish and store the new keys, then attend to all stored ones."""
        cache = hive.cache
        assert cache is not None
        q_weight, k_weight, eps = self._norm()
        k = finish_keys(k, k_weight, eps, self.qk_norm, hive.cos_TK, hive.sin_TK)
        k_BSGK, v_BSGK = cache.append_text(self.layer, k, v)
        if image_k is not None and image_v is not None:
            image_k = finish_keys(image_k, k_weight, eps, self.qk_norm, hive.image_cos_NK, hive.image_sin_NK)
            cache.image_keys[self.layer] = (image_k, image_v)
        image_k, image_v = cache.image_keys.get(self.layer, (None, None))
        out = hierarchical_attention(
            q, k_BSGK, v_BSGK, image_k, image_v, hive.layout,
            q_norm_weight=q_weight, norm_eps=eps, qk_norm=self.qk_norm,
            cos=hive.cos_TK, sin=hive.sin_TK, softmax_scale=self.softmax_scale,
            backend="auto" if self.is_flash else self.backend,
        )  # fmt: skip
        return cast(Tensor, out)  # without lse


def _linear_like(linear: Any) -> nn.Linear:
    return nn.Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
