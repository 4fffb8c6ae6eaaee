"""The training stages as data: which parameters form a group, and which groups a stage trains.

A group is a regular expression over parameter names, built from the model's routes. Every parameter must match exactly
one group, so nothing is trained or frozen by accident. Source: arXiv 2604.00086, stages 1 to 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hive_ds.errors import HiveError


@dataclass(frozen=True)
class ModuleGroup:
    """A named set of parameters."""

    name: str
    pattern: str
    """Regular expression that matches the whole parameter name."""


@dataclass(frozen=True)
class Stage:
    """One training stage."""

    number: int
    name: str
    image_kv: str
    """``shared``: images use the LLM layers' own k_proj and v_proj; ``own``: they have their own, copied from those."""
    trains: tuple[str, ...]
    """Names of the groups that train; all others are frozen."""


STAGES: tuple[Stage, ...] = (
    Stage(1, "connector_pretraining", "shared", ("projectors", "qk_norms")),
    Stage(2, "modality_adaptation", "own", ("projectors", "qk_norms", "routed_attention", "image_kv")),
    Stage(3, "vision_finetuning", "own", ("projectors", "qk_norms", "routed_attention", "image_kv", "vision_encoder")),
)


def stage_by_number(number: int) -> Stage:
    """The stage called ``number``.

    Raises:
        HiveError: there is no such stage.
    """
    for stage in STAGES:
        if stage.number == number:
            return stage
    raise HiveError(f"stage {number}: expected one of {', '.join(f'{s.number} ({s.name})' for s in STAGES)}")


def next_stage(stage: Stage) -> Stage | None:
    """The stage after ``stage``, or None after the last one."""
    return next((other for other in STAGES if other.number == stage.number + 1), None)


def hive_groups(language_layers: Iterable[int], last_vision_block: int) -> tuple[ModuleGroup, ...]:
    """The parameter groups of a HIVE model.

    ``routed_attention``: q, k, v, o projections of routed LLM layers; ``image_kv``: the image keys' own projections
    there; ``qk_norms``: the norms of queries and keys there; ``language_model``: the rest of the LLM.
    ``vision_encoder`` ends with the last routed block; ``vision_tail`` is what comes after, which never runs and never
    trains.

    Args:
        language_layers: routed LLM layers, counted from 0.
        last_vision_block: the deepest routed vision block, counted from 1; nothing after it gets a gradient.
    """
    routed = rf"language_model\.model\.layers\.{_one_of(language_layers)}\.self_attn\."
    routed_parts = rf"{routed}(?:[qk]_norm|[qkvo]_proj|image_[kv]_proj)\."
    vision = r"vision_encoder\.(?:vision_model\.)?"
    used = rf"(?:encoder\.)?layers?\.{_one_of(range(last_vision_block))}\."
    return (
        ModuleGroup("projectors", r"projectors\..+"),
        ModuleGroup("qk_norms", rf"{routed}[qk]_norm\..+"),
        ModuleGroup("routed_attention", rf"{routed}[qkvo]_proj\..+"),
        ModuleGroup("image_kv", rf"{routed}image_[kv]_proj\..+"),
        ModuleGroup("language_model", rf"(?!{routed_parts})language_model\..+"),
        ModuleGroup(
            "vision_encoder",
            rf"{vision}(?:(?!embeddings\.mask_token)embeddings\.|pre_layrnorm\.|{used}).+",
        ),
        ModuleGroup(
            "vision_tail",
            rf"{vision}(?:embeddings\.mask_token|(?:post_layernorm|layernorm|rms_norm|head|(?!{used})(?:encoder\.)?layers?)\..+)",
        ),
    )


def assign_groups(names: Iterable[str], groups: Sequence[ModuleGroup]) -> dict[str, str]:
    """Map every parameter name to the name of its one group.

    Raises:
        HiveError: parameters that match no group, or more than one; all are listed.
    """
    patterns = [(group.name, re.compile(group.pattern)) for group in groups]
    assigned, strays = {}, []
    for name in names:
        matches = [group for group, pattern in patterns if pattern.fullmatch(name)]
        if len(matches) == 1:
            assigned[name] = matches[0]
        else:
            strays.append(f"{name} ({' and '.join(matches) if matches else 'no group'})")
    if strays:
        raise HiveError(f"every parameter must match exactly one group; these do not: {', '.join(strays)}")
    return assigned


def _one_of(numbers: Iterable[int]) -> str:
    return f"(?:{'|'.join(str(number) for number in sorted(set(numbers)))})"
