"""Our attention under a name of transformers, for any causal LM of theirs: no images, but padding-free and fused.

    from hive_ds.model.attention_interface import register_attention

    register_attention()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="hive")

Rows are told apart by a 2-D ``attention_mask`` (padding left or right), samples packed in one row by ``cu_seq_lens_q``,
in any row by ``position_ids`` that start again at 0. A jump of positions is no start: transformers 4 takes it for one.
GPT-2 and GPTBigCode hand their attention neither: give each of their samples a row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface

from hive_ds.errors import HiveError
from hive_ds.kernels import BACKENDS, AttentionLayout, hierarchical_attention
from hive_ds.model.flash import FLASH_ATTENTION, TORCH_FLASH, TextBounds, flash_attention
from hive_ds.model.language import one_sequence_a_row

NAME = "hive"
_described: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What the host read from a mask, positions or bounds, and their version: all layers are handed the same tensor."""


def register_attention() -> None:
    """Make ``attn_implementation="hive"`` known to transformers, and each backend by name, as ``hive_sdpa``.

    Those are the backends of `hierarchical_attention`, and torch's flash attention for whole texts. Calling it again
    changes nothing.
    """
    for backend in (*BACKENDS, TORCH_FLASH):
        name = _name(backend)
        AttentionInterface.register(name, partial(attend, backend=backend))
        AttentionMaskInterface.register(name, key_mask)


def attention_name(backend: str) -> str:
    """What transformers calls the attention that a recipe calls ``backend``; registered if it is ours."""
    if backend == FLASH_ATTENTION:
        return backend
    register_attention()
    return _name(backend)


def _name(backend: str) -> str:
    return NAME if backend == "auto" else f"{NAME}_{backend}"


def bounds_are_given(language_model: Any) -> AbstractContextManager[None]:
    """Inside, ``language_model`` is told by ``cu_seq_lens_q`` where samples begin: transformers does not look, too.

    Only where the attention is ours, which reads them: any other may need what transformers finds.
    """
    ours = language_model.config._attn_implementation.startswith(NAME)
    return one_sequence_a_row() if ours else nullcontext()


def key_mask(
    batch_size: int,
    cache_position: Tensor | None = None,
    kv_length: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    *,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    device: torch.device | None = None,
    **unused: object,
) -> Tensor | None:
    """Keys that hold a token, bool (B, keys so far); None where all do. transformers calls this once a forward pass.

    Transformers 4 says where the queries are by ``cache_position``, transformers 5 by ``q_length`` and ``q_offset``.
    """
    if cache_position is not None:
        whole = len(cache_position) == kv_length  # as in training, where asking the tensor would wait for the GPU
        end, device = kv_length if whole else int(cache_position[-1]) + 1, cache_position.device
    else:
        end = int(q_offset) + q_length
    if "or_masks" in getattr(mask_function, "__qualname__", ""):
        raise HiveError(f"attention {NAME!r} is causal, and this model shows some tokens later ones; use 'sdpa'")
    if kv_offset:
        raise HiveError(f"attention {NAME!r} got a cache that dropped its first {kv_offset} keys; expected all of them")
    # A static cache is longer than what it holds. Anything else without padding is read where it lies.
    if attention_mask is None:
        return None if kv_length == end else torch.ones(batch_size, end, dtype=torch.bool, device=device)
    held = attention_mask[:, :end].bool()
    return None if kv_length == end and bool(held.all()) else held


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of one layer; queries (B, H, T, K), keys and values (B, G, S, K), already rotated.

    Returns:
        (B, T, H, K), zeros at padding, and no weights.

    Raises:
        HiveError: the layer wants what this attention does not do (sliding window, soft-capping, sinks, dropout,
            attention to later tokens).
    """
    _refuse_others(module, dropout, key.shape[2], options, attention_mask)
    # Autocast casts for SDPA, but not for us; its linear layers leave bf16, rotation and norms fp32.
    if query.dtype != value.dtype and torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    count, _, new, _ = query.shape
    rows = query.transpose(1, 2).flatten(0, 1)
    if attention_mask is None:
        lengths = _packed_lengths(options.get("cu_seq_lens_q"), options.get("position_ids"), query, key)
        keys, queries = (lengths, lengths) if lengths else ((key.shape[2],) * count, (new,) * count)
        layout = _without_images(keys, queries, query.device)
        out = _call(rows, *_text_keys(key, value, layout), layout, scaling, backend)
        return out.view(count, new, *out.shape[1:]), None
    layout, key_rows, query_rows = _padded_layout(attention_mask, new)
    end = attention_mask.shape[1]
    k, v = (x[:, :, :end].transpose(1, 2).flatten(0, 1).index_select(0, key_rows) for x in (key, value))
    found = _call(rows.index_select(0, query_rows), k, v, layout, scaling, backend)
    out = torch.zeros_like(rows).index_copy(0, query_rows, found)
    return out.view(count, new, *out.shape[1:]), None


def _call(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scaling: float | None, backend: str) -> Tensor:
    if backend == TORCH_FLASH:
        if not layout.decoding:
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            return flash_attention(backend, q, k, v, TextBounds.of(layout), scale)
        backend = "auto"
    out = hierarchical_attention(q, k, v, None, None, layout, softmax_scale=scaling, backend=backend)
    assert isinstance(out, Tensor)
    return out


def _refuse_others(module: nn.Module, dropout: float, keys: int, options: dict[str, Any], mask: Tensor | None) -> None:
    window = options.get("sliding_window")
    is_causal = options.get("is_causal")
    wanted = {
        f"a sliding window of {window} tokens over {keys} keys": window is not None and keys > window,
        f"logit soft-capping ({options.get('softcap')})": options.get("softcap") is not None,
        "attention sinks": options.get("s_aux") is not None,
        f"a mask of its own, {None if mask is None else tuple(mask.shape)}": mask is not None and mask.ndim != 2,
        f"attention dropout of {dropout}": dropout > 0,
        "attention to later tokens": not (getattr(module, "is_causal", True) if is_causal is None else is_causal),
    }
    for feature, has in wanted.items():
        if has:
            raise HiveError(
                f"attention {NAME!r} does not do what {type(module).__name__} asks for: {feature}; load the model with "
                "attn_implementation='sdpa'"
            )


def _packed_lengths(
    bounds: Tensor | None, positions: Tensor | None, query: Tensor, key: Tensor
) -> tuple[int, ...] | None:
    """Tokens of each sample of packed rows, row by row; None where rows are samples."""
    count, _, tokens, _ = query.shape
    if tokens != key.shape[2]:
        return None
    if bounds is not None and count == 1:
        return _once(bounds, lambda: tuple(bounds.diff().tolist()))
    # Of three kinds, as models with images have them, the first may be 0 for a whole image.
    if positions is None or positions.ndim > 2 or positions.shape[-1] != tokens:
        return None
    lengths = _once(positions, lambda: _lengths_from_starts(positions))
    return lengths * (count * tokens // sum(lengths)) if lengths else None


def _lengths_from_starts(positions: Tensor) -> tuple[int, ...] | None:
    """Of one row for all, or of a line for each; a row may begin in mid-sample."""
    is_start = (positions == 0).view(-1, positions.shape[-1])
    is_start[:, 0] = True
    starts = is_start.flatten().nonzero()[:, 0].tolist()
    if len(starts) == len(is_start):
        return None
    return tuple(end - start for start, end in pairwise([*starts, is_start.numel()]))


@lru_cache(maxsize=8)
def _without_images(lengths: tuple[int, ...], queries: tuple[int, ...], device: torch.device) -> AttentionLayout:
    """One layout for all layers, so that its tables are made once."""
    none: list[list[int]] = [[] for _ in lengths]
    return AttentionLayout.build(lengths, none, none, None if queries == lengths else queries, device=device)


def _text_keys(key: Tensor, value: Tensor, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
    """Of a whole text, packed rows; of a cache, (B, S, G, K) as it lies."""
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    return (keys, values) if layout.decoding else (keys.flatten(0, 1), values.flatten(0, 1))


def _padded_layout(mask: Tensor, new: int) -> tuple[AttentionLayout, Tensor, Tensor]:
    """The layout of a padded batch, and which of its flattened keys and queries hold tokens."""

    def describe() -> tuple[AttentionLayout, Tensor, Tensor]:
        fresh = mask[:, -new:]
        layout = _without_images(tuple(mask.sum(1).tolist()), tuple(fresh.sum(1).tolist()), mask.device)
        return layout, mask.flatten().nonzero()[:, 0], fresh.flatten().nonzero()[:, 0]

    return _once(mask, describe)


def _once(tensor: Tensor, describe: Callable[[], Any]) -> Any:
    if tensor.is_inference():  # counts no versions
        return describe()
    version, found = _described.get(tensor, (None, None))
    if version != tensor._version:
        found = describe()
        _described[tensor] = (tensor._version, found)
    return found
