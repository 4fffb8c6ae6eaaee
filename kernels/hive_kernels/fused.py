"""The Triton backend behind the public call: a call of the registered op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import KernelArguments
from .layout import AttentionLayout
from .registered import attend


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    layout: AttentionLayout,
    softmax_scale: float,
    *,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
    qk_norm: str,
    cos: Tensor | None,
    sin: Tensor | None,
    image_cos: Tensor | None,
    image_sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Norm, rotation and attention on checked arguments: out as `hierarchical_attention` returns it, and lse."""
    if image_k is None or image_v is None:
        image_k = image_v = k.new_empty(0, *k.shape[-2:])
    if layout.shares_images and not layout.decoding:
        rows, layout = layout.unshared
        image_k, image_v = image_k.index_select(0, rows), image_v.index_select(0, rows)
        if image_cos is not None and image_sin is not None:
            image_cos, image_sin = image_cos.index_select(0, rows), image_sin.index_select(0, rows)
    half = q.shape[-1] // 2
    cos, sin, image_cos, image_sin = (
        None if x is None else x[:, :half].float().contiguous() for x in (cos, sin, image_cos, image_sin)
    )
    arguments = _arguments(
        (q, k, v, image_k, image_v, q_norm_weight, k_norm_weight, cos, sin, image_cos, image_sin),
        layout, softmax_scale, norm_eps, qk_norm,
    )  # fmt: skip
    out, lse = attend(*arguments)
    return out, lse


def _arguments(
    tensors: tuple[Tensor | None, ...], layout: AttentionLayout, scale: float, eps: float, qk_norm: str
) -> KernelArguments:
    """What the op takes: ``tensors`` are its first eleven."""
    schedule = layout.schedule
    empty = schedule.samples[:0]
    q, k = tensors[:2]
    assert q is not None
    assert k is not None
    arguments = KernelArguments(  # type: ignore[call-arg]
        *tensors,  # type: ignore[arg-type]
        *(schedule.samples, schedule.seen, empty, empty, empty, empty),
        *(scale, eps, qk_norm, layout.decoding),  # type: ignore[arg-type]
        layout.max_queries * (q.shape[1] // k.shape[-2]),
        schedule.pairs,
    )
    return _with_work(arguments, layout)


def _with_work(arguments: KernelArguments, layout: AttentionLayout) -> KernelArguments:
    """The arguments with the lists of work for the tiles that serve them."""
    schedule, pack = layout.schedule, arguments.q.shape[1] // arguments.groups()
    arguments = arguments._replace(row_work=schedule.row_work(pack, arguments.forward_tile().rows))
    if layout.decoding:
        return arguments
    if arguments.one_pass():
        return arguments._replace(backward_work=schedule.sample_work())
    return arguments._replace(
        first_token=schedule.first_token,
        backward_work=schedule.row_work(pack, arguments.tile("queries").rows),
        key_work=schedule.key_work(arguments.tile("keys").keys),
    )


class KernelTables(NamedTuple):
    """What the kernels read of a layout: tensors on its device, and two counts."""

    samples: Tensor
    seen: Tensor
    first_token: Tensor
    row_work: Tensor
    backward_work: Tensor
    key_work: Tensor
    max_rows: int
    pairs: int


def prepare_layout(
    layout: AttentionLayout, *, heads: int, groups: int, head_dim: int, dtype: torch.dtype
) -> KernelTables:
    """Build, once a batch, what calls with this layout read: before a region that is compiled or captured in a graph.

    Eager calls build it by themselves the first time. torch.compile cannot trace it, and a CUDA graph cannot hold the
    copy to the device. What holds for one batch by chance must not be compiled in: that there are as many tiles as
    samples, or that forward and backward read the same table.

    Args:
        layout: of the batch.
        heads: query heads (H).
        groups: key/value heads (G).
        head_dim: K.
        dtype: of q.

    Returns:
        For `prepared_attention`.

    Raises:
        ValueError: image keys belong to several samples, or to none.
    """
    layout.max_seen, layout.num_queries, layout.num_text, layout.max_text  # noqa: B018 (the layout caches them)
    if layout.shares_images and not layout.decoding:
        raise ValueError("samples of the layout share images, or leave some out; expected each to have its own")
    q, k = (torch.empty(0, count, head_dim, dtype=dtype, device=layout.device) for count in (heads, groups))
    made = _arguments((q, k, k, k, k, *[None] * 6), layout, 1.0, 0.0, "none")
    if not layout.decoding:  # those of long texts as well: what is there now and then would be compiled for both
        key_work = layout.schedule.key_work(made.tile("keys").keys)
        made = made._replace(first_token=layout.schedule.first_token, key_work=key_work)
    made = made._replace(backward_work=made.backward_work[:])  # never the same tensor as row_work
    tables = KernelTables(*(getattr(made, name) for name in KernelTables._fields))
    for table in tables[:-2]:
        torch._dynamo.maybe_mark_dynamic(table, 0)
    return tables


def prepared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    tables: KernelTables,
    softmax_scale: float,
    *,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
    qk_norm: str,
    cos: Tensor | None,
    sin: Tensor | None,
    image_cos: Tensor | None,
    image_sin: Tensor | None,
) -> Tensor:
    """`hierarchical_attention` by the Triton kernels, whole texts, unchecked: what a compiled region calls.

    Nothing here depends on the lists of a layout, so that new lengths compile nothing. Arguments are those of
    `hierarchical_attention`, rotation as halves (rows, K/2) in fp32; no samples share images.

    Args:
        tables: of `prepare_layout`, in whose numbers of heads, head dim and dtype q and k are.
    """
    if image_k is None or image_v is None:
        image_k = image_v = k.new_empty(0, *k.shape[-2:])
    out, _ = attend(
        q, k, v, image_k, image_v, q_norm_weight, k_norm_weight, cos, sin, image_cos, image_sin, *tables[:6],
        softmax_scale, norm_eps, qk_norm, False, tables.max_rows, tables.pairs,
    )  # fmt: skip
    return out
