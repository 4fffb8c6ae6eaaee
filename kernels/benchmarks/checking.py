"""Whether a peer computes what the reference computes. Nothing is timed before it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hive_ds.kernels import AttentionLayout, hierarchical_attention
from hive_ds.kernels.finish import finish
from hive_ds.kernels.testing import Results, assert_as_exact, plain_attention, pooled

from .case import TABLES, Arguments, Case, require_gradients
from .peer import EPS, Peer


class Check:
    """Exact results of one case, and what plain code of the same dtype loses on it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.draws = [case.draw(seed) for seed in range(_draws(case))]
        if case.shape.decode:
            self.exact = pooled([_decoded_exactly(case, arguments) for arguments, _ in self.draws])
            self.plain = pooled([_decoded_plainly(case, arguments) for arguments, _ in self.draws])
            return
        self.exact = pooled([_by_sample(case, *draw, _reference, torch.float64) for draw in self.draws])
        self.plain = pooled([_by_sample(case, *draw, plain_attention, case.dtype) for draw in self.draws])

    def assert_agrees(self, peer: Peer) -> None:
        """Compare output and every gradient that the peer can give with the exact ones.

        Raises:
            AssertionError: one of them is further from exact than the tolerance rule allows (`assert_as_exact`).
        """
        found = pooled([run(peer, *draw) for draw in self.draws])
        assert "out" in found
        names = found.keys()
        exact, plain = ({name: x[name] for name in names} for x in (self.exact, self.plain))
        assert_as_exact(found, plain, exact, self.case.dtype)


def _draws(case: Case) -> int:
    """How often inputs are drawn: tiny ones several times, for their results are few numbers."""
    return 16 if case.layout.num_queries * case.shape.heads < 2**12 else 1


def run(peer: Peer, arguments: Arguments, cotangent: Tensor) -> Results:
    """Output and, where the peer has a backward, gradients; packed."""
    backward = "backward" in peer.shape.directions and peer.refuses("backward") is None
    with torch.inference_mode(False):
        native = {name: x.detach().clone() for name, x in peer.native(arguments).items()}
    leaves = require_gradients(native) if backward else []
    with torch.set_grad_enabled(backward):
        out = peer(native)
    results = {"out": peer.packed("out", out.detach())}
    if backward:
        names = [name for name in native if name not in TABLES]
        gradients = torch.autograd.grad(out, leaves, peer.native_output(cotangent))
        results |= {f"grad {name}": peer.packed(name, x) for name, x in zip(names, gradients, strict=True)}
    return results


def _reference(**arguments: object) -> Tensor:
    return hierarchical_attention(**arguments, backend="reference")  # type: ignore[arg-type, return-value]


def _by_sample(
    case: Case, arguments: Arguments, cotangent: Tensor, attend: Callable[..., object], dtype: torch.dtype
) -> Results:
    """Results of ``attend`` in ``dtype``, one sample at a time: dense scores of a whole batch would not fit."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: x.to(wide if name.endswith("weight") else dtype) for name, x in arguments.items()}
    # Plain code takes each frequency twice, as Hugging Face's tables hold it.
    inputs |= {name: arguments[name].to(wide).repeat(1, 2) for name in TABLES if name in arguments}
    for name, x in inputs.items():
        if name not in TABLES:
            inputs[name] = x.detach().clone().requires_grad_()
    outs = []
    for part, gradient, layout in _samples(case, inputs, cotangent.to(dtype)):
        out = attend(**part, layout=layout, norm_eps=EPS, qk_norm=case.shape.qk_norm)
        assert isinstance(out, Tensor)
        out.backward(gradient)
        outs.append(out.detach())
    gradients = {f"grad {name}": x.grad for name, x in inputs.items() if x.grad is not None}
    return {"out": torch.cat(outs)} | gradients


def _decoded_exactly(case: Case, arguments: Arguments) -> Results:
    with torch.no_grad():
        wide = {name: x.double() for name, x in arguments.items()}
        return {"out": _reference(**wide, layout=case.layout, norm_eps=EPS, qk_norm=case.shape.qk_norm)}


def _decoded_plainly(case: Case, arguments: Arguments) -> Results:
    """Plain code knows no decoding: its last row of a whole sample, whose queries are zeros but for the last."""
    a, shape, outs = arguments, case.shape, []
    with torch.no_grad():
        q = finish(a["q"], a["q_norm_weight"], EPS, shape.qk_norm, a["cos"], a["sin"])
        inputs = {name: a[name] for name in ("k", "v", "image_k", "image_v")} | {"q": q}
        for part, _, layout in _samples(case, inputs, q):
            whole = AttentionLayout.build(
                layout.text_lengths, layout.image_lengths, layout.image_offsets, device=layout.device
            )
            part["q"] = torch.cat([q.new_zeros(layout.num_text - len(part["q"]), *q.shape[1:]), part["q"]])
            out = plain_attention(**part, layout=whole)
            assert isinstance(out, Tensor)
            outs.append(out[-layout.num_queries :])
    return {"out": torch.cat(outs)}


def _samples(case: Case, inputs: Arguments, cotangent: Tensor) -> Iterator[tuple[Arguments, Tensor, AttentionLayout]]:
    layout = case.layout
    first_text = first_query = 0
    for b, text in enumerate(layout.text_lengths):
        queries, images = layout.query_lengths[b], sum(layout.image_lengths[b])
        spans = {"k": slice(first_text, first_text + text)}
        spans["q"] = slice(first_query, first_query + queries)
        spans["image"] = slice(layout.image_starts[b], layout.image_starts[b] + images)
        part = {name: x if name.endswith("weight") else x[spans[_kind(name)]] for name, x in inputs.items()}
        alone = AttentionLayout.build(
            [text],
            [layout.image_lengths[b]],
            [layout.image_offsets[b]],
            query_lengths=[queries] if case.shape.decode else None,
            device=layout.device,
        )
        yield part, cotangent[spans["q"]], alone
        first_text, first_query = first_text + text, first_query + queries


def _kind(name: str) -> str:
    if name.startswith("image"):
        return "image"
    return "k" if name in ("k", "v") else "q"
