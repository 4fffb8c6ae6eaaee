"""The training stages as data: which parameters form a group, and which groups a stage trains.

A group is a regular expression over parameter names, built from how the model is joined. Every parameter must match
exactly one group, so nothing is trained or frozen by accident. Source: arXiv 2604.00086.
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
    trains: tuple[str, ...]
    """Names of the groups that train; all others are frozen."""

    @property
    def image_kv(self) -> str:
        """Of a HIVE model. ``shared``: images use the LLM layers' own k_proj and v_proj; ``own``: copies of those."""
        return "own" if "image_kv" in self.trains else "shared"


HIVE_STAGES: tuple[Stage, ...] = (
    Stage(1, "connector_pretraining", ("projectors", "qk_norms")),
    Stage(2, "modality_adaptation", ("projectors", "qk_norms", "routed_attention", "image_kv")),
    Stage(3, "vision_finetuning", ("projectors", "qk_norms", "routed_attention", "image_kv", "vision_encoder")),
)
"""Stages that pre-train the encoder, under a HIVE model."""

CASCADED_STAGES: tuple[Stage, ...] = (
    Stage(1, "connector_pretraining", ("projectors",)),
    Stage(2, "modality_adaptation", ("projectors", "first_attention")),
    Stage(3, "vision_finetuning", ("projectors", "first_attention", "vision_encoder")),
)
"""The same stages under a cascaded model: the paper's self-attention baseline."""

VLM_STAGES: tuple[Stage, ...] = (
    Stage(4, "vlm_alignment", ("projectors",)),
    Stage(5, "vlm_instruction_tuning", ("projectors", "first_attention", "language_model")),
)
"""Stages that judge the encoder, frozen in a cascaded model with a chat LLM (`hive_ds.config.VlmConfig`)."""

STAGES = HIVE_STAGES + VLM_STAGES
STAGES_BY_KIND = {"hive": STAGES, "cascaded": CASCADED_STAGES + VLM_STAGES}
"""Kind of the model that stages 1 to 3 train -> all stages of a run."""


def stage_by_number(number: int, kind: str = "hive") -> Stage:
    """The stage called ``number`` of a run whose encoder is pre-trained in a model of ``kind``.

    Raises:
        HiveError: there is no such stage.
    """
    return stage_called(str(number), kind)


def stage_called(name: str, kind: str = "hive") -> Stage:
    """The same by number or name, as on a command line.

    Raises:
        HiveError: there is no such stage.
    """
    for stage in STAGES_BY_KIND[kind]:
        if name in (str(stage.number), stage.name):
            return stage
    raise HiveError(f"stage {name}: expected one of {', '.join(f'{s.number} ({s.name})' for s in STAGES)}")


def next_stage(stage: Stage, described: Iterable[str]) -> Stage | None:
    """The stage after ``stage`` whose name is in ``described``, or None after the last one."""
    return next((other for other in STAGES if other.number > stage.number and other.name in described), None)


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
    return (
        ModuleGroup("projectors", r"projectors\..+"),
        ModuleGroup("qk_norms", rf"{routed}[qk]_norm\..+"),
        ModuleGroup("routed_attention", rf"{routed}[qkvo]_proj\..+"),
        ModuleGroup("image_kv", rf"{routed}image_[kv]_proj\..+"),
        ModuleGroup("language_model", rf"(?!{routed_parts})language_model\..+"),
        *_vision_groups(last_vision_block),
    )


def cascaded_groups(last_vision_block: int) -> tuple[ModuleGroup, ...]:
    """The parameter groups of a cascaded model.

    ``projectors``: its one projector; ``first_attention``: self-attention of the first LLM layer, which is the first to
    see image tokens; ``language_model``: the rest of the LLM, its head included; the encoder's as in `hive_groups`.

    Args:
        last_vision_block: the block whose features the LLM sees, counted from 1.
    """
    first = r"language_model\.model\.layers\.0\.self_attn\."
    return (
        ModuleGroup("projectors", r"projector\..+"),
        ModuleGroup("first_attention", rf"{first}.+"),
        ModuleGroup("language_model", rf"(?!{first})language_model\..+"),
        *_vision_groups(last_vision_block),
    )


def _vision_groups(last_vision_block: int) -> tuple[ModuleGroup, ...]:
    vision = r"vision_encoder\.(?:vision_model\.)?"
    used = rf"(?:encoder\.|model\.)?layers?\.{_one_of(range(last_vision_block))}\."
    return (
        ModuleGroup(
            "vision_encoder",
            rf"{vision}(?:(?!embeddings\.mask_token)embeddings\.|pre_layrnorm\.|{used}).+",
        ),
        ModuleGroup(
            "vision_tail",
            rf"{vision}(?:embeddings\.mask_token|(?:post_layernorm|layernorm|rms_norm|head|norm|(?!{used})(?:encoder\.|model\.)?layers?)\..+)",
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
