"""The LLM's last layer computes only what the loss reads.

After its attention nothing mixes tokens: output projection, MLP and head need only the tokens that predict a supervised
one. Axes: T text token, R wanted token, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from hive_ds.model.attention import AttentionCall


def narrow_on_request(layer: Any) -> None:
    """Let a decoder layer, in place, return the tokens ``rows_R`` of its `AttentionCall` alone, (1, R, D)."""
    layer.forward = partial(_forward, layer, layer.forward)


def _forward(
    layer: Any, forward: Callable[..., Any], hidden_states: Tensor, *, hive: AttentionCall, **others: Any
) -> Any:
    # All tokens come in, so that hooks on the layer's input (ZeRO-3 has some) see the whole of its backward pass.
    if hive.rows_R is None:
        return forward(hidden_states, hive=hive, **others)
    text_TD = layer.input_layernorm(hidden_states).squeeze(0)
    return forward(hidden_states.index_select(1, hive.rows_R), hive=replace(hive, text_TD=text_TD), **others)
