"""Features of a stock Hugging Face vision encoder, block by block, stopping after the last block that is needed.

Blocks count from 1, the index of Hugging Face's ``hidden_states``. Features are patch tokens only (CLS and register
tokens dropped), before the encoder's final norm. Axes: I image, P token of an image, N patch of all images, D width.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hive_ds.errors import HiveError
from hive_ds.kernels import to_device
from hive_ds.model.positions import Grid
from hive_ds.model.runs import split_runs


@dataclass(frozen=True)
class VisionFamily:
    """What differs between encoder families."""

    model_class: str
    """Name of the vision tower's class in transformers."""
    has_cls: bool
    """A CLS token (and registers, where the config names them) stands before the patches."""
    nested_in_v4: bool
    """transformers 4 wraps the tower in one more module, `vision_model`; transformers 5 does not."""
    any_size: bool = False
    """Takes images of any size that its patches tile: positions are interpolated, or rotary."""


FAMILIES = {
    "siglip_vision_model": VisionFamily("SiglipVisionModel", has_cls=False, nested_in_v4=True),
    "siglip2_vision_model": VisionFamily("Siglip2VisionModel", has_cls=False, nested_in_v4=True),
    "clip_vision_model": VisionFamily("CLIPVisionModel", has_cls=True, nested_in_v4=True),
    "dinov2": VisionFamily("Dinov2Model", has_cls=True, nested_in_v4=False, any_size=True),
    "dinov2_with_registers": VisionFamily("Dinov2WithRegistersModel", has_cls=True, nested_in_v4=False, any_size=True),
    "dinov3_vit": VisionFamily("DINOv3ViTModel", has_cls=True, nested_in_v4=False, any_size=True),
    "aimv2_vision_model": VisionFamily("Aimv2VisionModel", has_cls=False, nested_in_v4=False),
}


@dataclass(frozen=True)
class VisionFeatures:
    """Features of every image of a batch, patches end to end.

    Attributes:
        by_block: block number -> (N, D) features.
        grids: (rows, columns) of each image; N is the sum of their products.
    """

    by_block: dict[int, Tensor]
    grids: list[Grid]


def vision_config_of(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The vision part of a checkpoint's config (a full CLIP or SigLIP checkpoint also holds a text tower).

    Raises:
        HiveError: the family is not supported.
    """
    vision = getattr(config, "vision_config", config)
    if vision.model_type not in FAMILIES:
        raise HiveError(
            f"vision encoder of type {vision.model_type!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    return vision


def vision_class(config: transformers.PretrainedConfig) -> type[transformers.PreTrainedModel]:
    """The transformers class that holds the vision tower of ``config``."""
    return getattr(transformers, FAMILIES[vision_config_of(config).model_type].model_class)


def tower_key_mapping(config: transformers.PretrainedConfig) -> dict[str, str]:
    """Patterns that turn either saved form of a HIVE model's tower names into that of the installed transformers.

    transformers 4 nests SigLIP and CLIP towers one level deeper (``vision_model``) than transformers 5, and DINOv3's
    blocks one level less (``model``).
    """
    if config.model_type == "dinov3_vit":  # transformers 5 turns the flat names into its own itself
        return {r"^vision_encoder\.model\.layer\.": "vision_encoder.layer."}
    if transformers.__version__.startswith("4.") and FAMILIES[config.model_type].nested_in_v4:
        return {r"^vision_encoder\.(?!vision_model\.)": "vision_encoder.vision_model."}
    return {r"^vision_encoder\.vision_model\.": "vision_encoder."}


def vision_blocks(encoder: nn.Module) -> nn.ModuleList:
    """The encoder's transformer blocks, in order."""
    trunk = _trunk(encoder)
    stack = getattr(trunk, "encoder", None) or getattr(
        trunk, "model", trunk
    )  # the last two: DINOv3 in transformers 5, 4
    return stack.layer if hasattr(stack, "layer") else stack.layers


def encode_images(
    encoder: transformers.PreTrainedModel,
    blocks: Sequence[int],
    pixel_values: Tensor,
    *,
    pixel_attention_mask: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
) -> VisionFeatures:
    """Run the encoder up to the last of ``blocks`` and return their features.

    PyTorch records no graph of a frozen encoder, unless the pixels require a gradient.

    Args:
        encoder: a vision tower of one of `FAMILIES`.
        blocks: block numbers, from 1.
        pixel_values: (I, 3, height, width); for SigLIP2's variable resolution (I, P, patch values).
        pixel_attention_mask: (I, P), 1 on patches; variable resolution only.
        spatial_shapes: (I, 2) rows and columns; variable resolution only.

    Raises:
        HiveError: the images do not fit the encoder.
    """
    hidden = _embed(encoder, pixel_values, spatial_shapes)
    grids = patch_grids(encoder.config, pixel_values, spatial_shapes)
    stack = vision_blocks(encoder)
    shared: list[Any] = [_block_mask(encoder, hidden, pixel_attention_mask), None]
    del shared[_count_masks(type(stack[0]).forward) :]
    if hasattr(encoder, "rope_embeddings"):
        shared.append(rotation(encoder.config, grids[0], hidden))
    rows_N = None if spatial_shapes is None else patch_rows(grids, hidden.shape[1], hidden.device)
    by_block = {}
    for run in split_runs(max(blocks), [number - 1 for number in blocks]):
        hidden = block_runner(encoder)([stack[index] for index in run], hidden, shared)
        if run.stop in blocks:
            by_block[run.stop] = patch_tokens(encoder.config, hidden, rows_N)
    return VisionFeatures(by_block, grids)


def run_blocks(blocks: Sequence[nn.Module], hidden: Tensor, shared: Sequence[Any]) -> Tensor:
    """Hidden states (I, P, D) through some blocks of an encoder, one after the other.

    Args:
        blocks: of the encoder.
        hidden: tokens before the first of them.
        shared: what each block takes beside its tokens: masks, and DINOv3's `rotation`.
    """
    for block in blocks:
        output = block(hidden, *shared)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def block_runner(encoder: nn.Module) -> Callable[..., Tensor]:
    """What runs an encoder's blocks: `run_blocks`, unless another one is set, such as one that is compiled."""
    return getattr(encoder, "run_blocks", run_blocks)


@contextlib.contextmanager
def running_blocks(encoder: nn.Module, runner: Callable[..., Tensor]) -> Iterator[None]:
    """Let ``runner`` run an encoder's blocks inside."""
    before = vars(encoder).get("run_blocks")
    encoder.run_blocks = runner  # type: ignore[assignment]
    try:
        yield
    finally:
        del encoder.run_blocks
        if before is not None:
            encoder.run_blocks = before


def rest_if_frozen(encoder: nn.Module) -> None:
    """Put an encoder that does not train into evaluation mode: no dropout."""
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        encoder.eval()


def _trunk(encoder: nn.Module) -> Any:
    return getattr(encoder, "vision_model", encoder)  # see `VisionFamily.nested_in_v4`


def _embed(encoder: transformers.PreTrainedModel, pixel_values: Tensor, spatial_shapes: Tensor | None) -> Tensor:
    trunk, pixel_values = _trunk(encoder), pixel_values.to(encoder.dtype)  # AIMv2's embeddings alone leave that out
    if _is_variable_resolution(encoder.config):
        if spatial_shapes is None:
            raise HiveError("spatial_shapes is missing; SigLIP2's variable-resolution encoder needs (images, 2)")
        return trunk.embeddings(pixel_values, spatial_shapes)
    _check_image_size(encoder.config, pixel_values)
    hidden = trunk.embeddings(pixel_values)
    return trunk.pre_layrnorm(hidden) if hasattr(trunk, "pre_layrnorm") else hidden


def _is_variable_resolution(config: transformers.PretrainedConfig) -> bool:
    return config.model_type == "siglip2_vision_model"


def _check_image_size(config: transformers.PretrainedConfig, pixel_values: Tensor) -> None:
    height, width = pixel_values.shape[-2:]
    if FAMILIES[config.model_type].any_size:
        step = config.patch_size
        fits, expected = height % step == width % step == 0, f"multiples of {step}"
    else:
        fits, expected = height == width == config.image_size, f"{config.image_size} x {config.image_size}"
    if not fits:
        raise HiveError(f"pixel_values are {height} x {width} pixels; {config.model_type} expects {expected}")


def patch_grids(
    config: transformers.PretrainedConfig, pixel_values: Tensor, spatial_shapes: Tensor | None
) -> list[Grid]:
    """(rows, columns) of patches of each image; arguments as in `encode_images`."""
    if spatial_shapes is not None:
        return [(int(rows), int(columns)) for rows, columns in spatial_shapes.tolist()]
    height, width = pixel_values.shape[-2:]
    return [(height // config.patch_size, width // config.patch_size)] * len(pixel_values)


def _block_mask(encoder: transformers.PreTrainedModel, hidden: Tensor, mask_IP: Tensor | None) -> Tensor | None:
    """What the encoder's own forward hands its blocks: an additive (I, 1, P, P) mask, or the (I, P) one for flash."""
    if mask_IP is None or encoder.config._attn_implementation == "flash_attention_2":
        return mask_IP
    blocked = torch.zeros_like(mask_IP, dtype=hidden.dtype).masked_fill(mask_IP == 0, torch.finfo(hidden.dtype).min)
    return blocked[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)


def rotation(config: transformers.PretrainedConfig, grid: Grid, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """DINOv3's rotary tables of the patches of an image, cosines and sines: (patches, head dim), as ``hidden``.

    Computed here because a model that was cast to bf16 has its frequencies in bf16, and because in training the encoder
    scales the positions of a batch at random (``pos_embed_rescale``): training would differ by how batches are cut.
    """
    arange = partial(torch.arange, dtype=torch.float32, device=hidden.device)
    frequencies = config.rope_theta ** -arange(0, 1, 4 * config.num_attention_heads / config.hidden_size)
    centres = [(arange(count) + 0.5) * (2 / count) - 1 for count in grid]
    positions = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)
    angles = 2 * math.pi * (positions[:, :, None] * frequencies).flatten(1).tile(2)
    return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


@cache
def _count_masks(forward: Callable[..., Any]) -> int:
    """Masks that a block takes: DINOv2's none in transformers 5.17, CLIP's a causal one too in transformers 4."""
    return sum(name.endswith("_mask") for name in inspect.signature(forward).parameters)


def patch_rows(grids: Sequence[Grid], tokens: int, device: torch.device) -> Tensor:
    """Where the patches of images of these grids stand among ``tokens`` of each, padded at the end: (N,) on ``device``.

    Made on the CPU: selecting by a mask on a GPU would make the host wait for it.
    """
    rows = [torch.arange(rows * columns) + index * tokens for index, (rows, columns) in enumerate(grids)]
    return to_device(torch.cat(rows), device)


def patch_tokens(config: transformers.PretrainedConfig, hidden: Tensor, rows_N: Tensor | None) -> Tensor:
    """(I, P, D) tokens of a block -> (N, D) patches of all images end to end.

    Args:
        config: of the encoder.
        hidden: tokens of a block.
        rows_N: `patch_rows` of images of variable resolution; None: all tokens after the first few are patches.
    """
    if rows_N is not None:
        return hidden.flatten(0, 1).index_select(0, rows_N)
    return hidden[:, tokens_before_patches(config) :].flatten(0, 1)


def tokens_before_patches(config: transformers.PretrainedConfig) -> int:
    """CLS and register tokens, which stand before the patches of an image."""
    return 1 + getattr(config, "num_register_tokens", 0) if FAMILIES[config.model_type].has_cls else 0
