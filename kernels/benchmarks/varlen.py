"""Variable-length attention of whatever library is installed, and two calls of it merged into one softmax."""

from __future__ import annotations

import importlib.util
import inspect
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor

from .joining import Varlen

Merging = torch.autograd.function.FunctionCtx


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation `varlen_attention` takes: flash-attn, torch's own, or loops for what neither can do."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "loops"
    if importlib.util.find_spec("flash_attn") is not None:
        return f"flash-attn {version('flash_attn')}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return f"torch {torch.__version__} varlen_attn"
    return "loops"


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: Varlen, backend: str) -> Tensor:
    """Bottom-right causal attention inside each piece of ``plan``; differentiable.

    Args:
        q: (queries, H, K).
        k: (keys of the plan, G, K).
        v: like k.
        plan: where pieces begin.
        backend: from `backend_name`.
    """
    where = (plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)
    if backend.startswith("flash-attn"):
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *where, causal=True)
    if backend.startswith("torch"):
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        return cast(Tensor, varlen_attn(q, k, v, *where, **options))
    return loop_forward(q, k, v, plan, causal=True)[0]


def merged_attention(q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor, plans: Plans) -> Tensor:
    """Softmax over two key sources from one flash call each: outputs weighed by their log-sum-exp.

    The gradient needs no gradient of either log-sum-exp: with the merged output and the merged log-sum-exp each call's
    backward gives its share of the joint softmax.
    """
    return _Merged.apply(q, k, v, image_k, image_v, plans)


class Plans:
    """The two calls of `merged_attention`."""

    def __init__(self, text: Varlen, image: Varlen, flash: bool) -> None:
        self.text, self.image = text, image
        self.forward = flash_forward if flash else loop_forward
        self.backward = flash_backward if flash else loop_backward


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Merging, q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor, plans: Plans
    ) -> Tensor:
        text = plans.forward(q, k, v, plans.text, causal=True)
        image = plans.forward(q, image_k, image_v, plans.image, causal=False)
        out, lse = merge(*text, *image)
        ctx.save_for_backward(q, k, v, image_k, image_v, out, lse)
        ctx.plans = plans  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: Merging, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, image_k, image_v, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        plans: Plans = ctx.plans  # type: ignore[attr-defined]
        dq, dk, dv = plans.backward(gradient, q, k, v, out, lse, plans.text, causal=True)
        more_dq, image_dk, image_dv = plans.backward(gradient, q, image_k, image_v, out, lse, plans.image, causal=False)
        return dq + more_dq, dk, dv, image_dk, image_dv, None


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    # Flash kernels say +inf where a query has no key at all.
    other_lse = other_lse.masked_fill(other_lse.isinf(), float("-inf"))
    joint = torch.logaddexp(lse, other_lse)
    own, others = (torch.exp(x - joint).T[:, :, None] for x in (lse, other_lse))
    return (out * own + torch.where(others > 0, other * others, 0)).to(out.dtype), joint


_compiled_merge = torch.compile(_merge, dynamic=False)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial softmaxes as one: outputs (T, H, K), log-sum-exps (H, T); the second may have seen no key."""
    return (_compiled_merge if out.is_cuda else _merge)(out, lse, other, other_lse)


def flash_forward(q: Tensor, k: Tensor, v: Tensor, plan: Varlen, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Torch's own FlashAttention-2, the kernel below `varlen_attn`: out (T, H, K), lse (H, T)."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, 0.0, causal, False
    )
    return out, lse


def flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Varlen, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the output and log-sum-exp of the whole softmax, of which this may be a part."""
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout, which is off
    where = (plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)
    return torch.ops.aten._flash_attention_backward(
        gradient.contiguous(), q, k, v, out, lse, *where, 0.0, causal, state, state.new_empty(0)
    )


def loop_forward(q: Tensor, k: Tensor, v: Tensor, plan: Varlen, *, causal: bool) -> tuple[Tensor, Tensor]:
    """`flash_forward` piece by piece in fp32, for machines without a flash kernel; differentiable."""
    outs, lses = [], []
    for queries, keys, values in _split(_wide(q), _wide(k), _wide(v), plan):
        scores = _scores(queries, keys, causal)
        lse = torch.logsumexp(scores, dim=-1)
        # A query without a key has lse -inf; its output is zero, as a flash kernel's.
        weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[:, :, None])
        outs.append(torch.einsum("hts,shk->thk", weights, _heads(values, q)))
        lses.append(lse)
    return torch.cat(outs).to(q.dtype), torch.cat(lses, dim=1)


def loop_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Varlen, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_backward` piece by piece."""
    found: list[list[Tensor]] = [[], [], []]
    dtype = q.dtype
    gradient, q, k, v, out = (_wide(x) for x in (gradient, q, k, v, out))
    delta = (gradient * out).sum(-1).T
    counts = plan.query_lengths
    rows = zip(gradient.split(counts), lse.split(counts, 1), delta.split(counts, 1), strict=True)
    for (queries, keys, values), (d_out, total, share) in zip(_split(q, k, v, plan), rows, strict=True):
        weights = torch.exp(_scores(queries, keys, causal) - total[:, :, None])
        d_weights = torch.einsum("thk,shk->hts", d_out, _heads(values, q))
        d_scores = weights * (d_weights - share[:, :, None]) * q.shape[-1] ** -0.5
        found[0].append(torch.einsum("hts,shk->thk", d_scores, _heads(keys, q)))
        for target, left, right in ((1, d_scores, queries), (2, weights, d_out)):
            every_head = torch.einsum("hts,thk->shk", left, right)
            found[target].append(every_head.unflatten(1, (k.shape[1], -1)).sum(2))
    dq, dk, dv = (torch.cat(parts).to(dtype) for parts in found)
    return dq, dk, dv


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _split(q: Tensor, k: Tensor, v: Tensor, plan: Varlen) -> zip[tuple[Tensor, ...]]:
    return zip(q.split(plan.query_lengths), k.split(plan.key_lengths), v.split(plan.key_lengths), strict=True)


def _heads(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """(H, queries, keys), -inf where causality hides a key: the last query sees all."""
    scores = torch.einsum("thk,shk->hts", q, _heads(k, q)) * q.shape[-1] ** -0.5
    if not causal:
        return scores
    seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    return scores.masked_fill(~seen, float("-inf"))
