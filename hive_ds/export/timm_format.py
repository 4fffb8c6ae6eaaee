"""The encoder as a folder of timm: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel

from hive_ds.errors import HiveError
from hive_ds.export.formats import (
    PICTURE,
    WEIGHTS,
    Job,
    Written,
    foreign_features,
    mean_and_std,
    mlp_ratio,
    refuse_family,
)
from hive_ds.export.names import TIMM_CLIP, TIMM_DINOV2, TIMM_SIGLIP, Table, rename
from hive_ds.export.parity import check_names, foreign_difference

TABLES: dict[str, Table] = {
    "siglip_vision_model": TIMM_SIGLIP,
    "clip_vision_model": TIMM_CLIP,
    "dinov2": TIMM_DINOV2,
    "dinov2_with_registers": TIMM_DINOV2,
}
SUPPORTED = "SigLIP (and SigLIP2 of fixed resolution), CLIP, DINOv2 with and without registers"
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
"""transformers' name -> timm's."""
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""PIL's number -> timm's name."""


def write(job: Job) -> Written:
    """Write weights and config under timm's names; compare features with the model that timm makes of the folder.

    Raises:
        HiveError: timm is not installed, or has no such model.
    """
    timm = import_timm()
    own = job.encoder.config
    job = _at_trained_size(job)
    config = job.encoder.config
    weights = timm_weights(job.encoder)
    arguments = timm_arguments(config)
    named = find_named(timm, config, arguments)
    architecture = named or _base_architecture(config)
    save_file(weights, job.folder / WEIGHTS, metadata={"format": "pt"})
    description = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": config.hidden_size,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {"num_classes": 0, **_preprocessing(job.processor, config.image_size)},
    }
    (job.folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    name = f"timm {named or 'VisionTransformer'}"
    return Written(name, _usage(job), _difference(job, timm), "fp64", _notes(config, named, arguments, own.image_size))


def _at_trained_size(job: Job) -> Job:
    """The job with position embeddings for the pictures that the image processor gives, by transformers' rule.

    Stock DINOv2 has those of 518 pixels and sees 224; timm's rule for that is another one.
    """
    config = job.encoder.config
    if not config.model_type.startswith("dinov2"):
        return job
    size = _picture_size(job.processor)
    if size is None or size == config.image_size or size % config.patch_size:
        return job
    encoder = copy.deepcopy(job.encoder)
    embeddings = encoder.embeddings
    tokens = torch.empty(1, 1 + (size // config.patch_size) ** 2, config.hidden_size)
    with torch.no_grad():
        embeddings.position_embeddings = torch.nn.Parameter(embeddings.interpolate_pos_encoding(tokens, size, size))
    encoder.config.image_size = size
    return replace(job, encoder=encoder)


def _picture_size(processor: BaseImageProcessor) -> int | None:
    """Side of the squares that an image processor gives; None where they are none."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    height, width = size.get("height"), size.get("width")
    return height if height == width else None


def import_timm() -> Any:
    """timm.

    Raises:
        HiveError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise HiveError("timm is not installed; pip install 'hive-ds[timm]'") from error
    return timm


def timm_weights(encoder: PreTrainedModel) -> dict[str, Tensor]:
    """An encoder's weights under timm's names.

    Raises:
        HiveError: timm has no model of the family.
    """
    config = encoder.config
    if config.model_type not in TABLES:
        raise refuse_family(config, "timm", SUPPORTED)
    weights = rename(encoder.state_dict().items(), TABLES[config.model_type])
    for name in ("pos_embed", "cls_token"):
        if name in weights:
            weights[name] = weights[name].reshape(1, -1, config.hidden_size)
    for kind in ("weight", "bias"):
        if (joined := weights.pop(f"attn_pool.in_proj.{kind}", None)) is not None:
            weights[f"attn_pool.q.{kind}"] = joined[: config.hidden_size].contiguous()
            weights[f"attn_pool.kv.{kind}"] = joined[config.hidden_size :].contiguous()
    if "reg_token" in weights:
        # timm gives CLS its position once and for all; the sum is rounded in fp32, whatever the weights' type.
        positions = weights["pos_embed"]
        weights["cls_token"] = weights["cls_token"].float() + positions[:, :1].float()
        weights["pos_embed"] = positions[:, 1:].contiguous()
    return weights


def timm_arguments(config: PretrainedConfig) -> dict[str, Any]:
    """Arguments, as JSON can hold them, of timm's model over those of its `_base_architecture`.

    Raises:
        HiveError: the config says what timm's model cannot be told.
    """
    dinov2 = config.model_type.startswith("dinov2")
    swiglu = dinov2 and config.use_swiglu_ffn
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _dinov2_mlp_ratio(config) if dinov2 else mlp_ratio(config),
        "global_pool": "token",
    }
    if not swiglu:
        arguments["act_layer"] = _activation(config)
    if config.model_type == "siglip_vision_model":
        has_head = getattr(config, "vision_use_head", True)
        arguments |= {"global_pool": "map"} if has_head else {"global_pool": "avg", "fc_norm": False}
    if dinov2:
        # Other sizes are resampled by timm's rule, which is not transformers'.
        arguments |= {"dynamic_img_size": True, "qkv_bias": config.qkv_bias}
    if config.model_type == "dinov2_with_registers":
        arguments["reg_tokens"] = config.num_register_tokens
    _check_eps(config)
    return arguments


def _dinov2_mlp_ratio(config: PretrainedConfig) -> float:
    if not config.use_swiglu_ffn:
        return float(config.mlp_ratio)
    hidden = (int(int(config.hidden_size * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8
    return (2 * hidden + 0.5) / config.hidden_size  # timm cuts the product to an integer


def _activation(config: PretrainedConfig) -> str:
    if config.hidden_act not in ACTIVATIONS:
        raise HiveError(f"hidden_act {config.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)} for timm")
    return ACTIVATIONS[config.hidden_act]


def _check_eps(config: PretrainedConfig) -> None:
    expected = 1e-5 if config.model_type == "clip_vision_model" else 1e-6
    if config.layer_norm_eps != expected:
        raise HiveError(f"layer_norm_eps is {config.layer_norm_eps}; timm's models of this family have {expected}")


def _base_architecture(config: PretrainedConfig) -> str:
    """A model of timm's that differs from ours in `timm_arguments` alone."""
    if config.model_type == "siglip_vision_model":
        return "vit_base_patch16_siglip_224"
    if config.model_type == "clip_vision_model":
        return "vit_base_patch16_clip_224"
    size = "giant" if config.use_swiglu_ffn else "base"
    registers = "_reg4" if config.model_type == "dinov2_with_registers" else ""
    return f"vit_{size}_patch14{registers}_dinov2"


def find_named(timm: Any, config: PretrainedConfig, arguments: dict[str, Any]) -> str | None:
    """timm's own model of these sizes, if it has one: with our activation, or else with another."""
    pattern = {
        "siglip_vision_model": f"vit_*_patch{config.patch_size}_siglip_{config.image_size}",
        "clip_vision_model": f"vit_*_patch{config.patch_size}_clip*_{config.image_size}",
        "dinov2": f"vit_*_patch{config.patch_size}_dinov2",
        "dinov2_with_registers": f"vit_*_patch{config.patch_size}_reg*_dinov2",
    }[config.model_type]
    with torch.device("meta"):
        ours = timm.create_model(_base_architecture(config), num_classes=0, **arguments)
        models = {name: timm.create_model(name, num_classes=0) for name in timm.list_models(pattern)}
    fitting = {name: model for name, model in models.items() if _signature(model) == _signature(ours)}
    alike = [name for name, model in fitting.items() if repr(model.blocks[0].mlp) == repr(ours.blocks[0].mlp)]
    return next(iter([*alike, *fitting]), None)


def _signature(model: Any) -> tuple[Any, ...]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, model.blocks[0].attn.num_heads, model.patch_embed.img_size, model.global_pool


def _preprocessing(processor: BaseImageProcessor, image_size: int) -> dict[str, Any]:
    """What timm calls the image processor's doing, at the encoder's own size."""
    settings: dict[str, Any] = {
        "input_size": [3, image_size, image_size],
        "fixed_input_size": True,
        "interpolation": INTERPOLATIONS[int(processor.resample)],
        "crop_pct": 1.0,
        "crop_mode": "squash",
        **mean_and_std(processor),
    }
    shortest = processor.size.get("shortest_edge")
    if shortest is not None and getattr(processor, "do_center_crop", False):
        settings |= {"crop_mode": "center", "crop_pct": _crop_share(processor.crop_size["height"], shortest)}
    if getattr(processor, "do_pad", False):
        settings |= {"crop_mode": "border"}
    return settings


def _crop_share(crop: int, shortest: int) -> float:
    """What timm divides ``crop`` by, and cuts to an integer, to resize to ``shortest``."""
    share = crop / shortest
    return share if int(crop / share) == shortest else crop / (shortest + 0.5)


def _usage(job: Job) -> str:
    return (
        "import timm\nimport torch\nfrom PIL import Image\n\n"
        f'encoder = timm.create_model("local-dir:{job.name}", pretrained=True).eval()\n'
        "settings = timm.data.resolve_model_data_config(encoder)\n"
        "preprocess = timm.data.create_transform(**settings, is_training=False)\n"
        f"pixels = preprocess({PICTURE})[None]\n{foreign_features('encoder', job.blocks[-1])}"
    )


def _difference(job: Job, timm: Any) -> float:
    model = timm.create_model(f"local-dir:{job.folder}", pretrained=True)
    found = model.load_state_dict(load_file(job.folder / WEIGHTS), strict=False)
    check_names(found.missing_keys, found.unexpected_keys, "timm")
    return foreign_difference(job.encoder, job.blocks, model)


def _notes(config: PretrainedConfig, named: str | None, arguments: dict[str, Any], own_size: int) -> tuple[str, ...]:
    notes = []
    if named is None:
        notes.append("timm has no model of these sizes under a name of its own; config.json holds its arguments.")
    else:
        act = f', act_layer="{arguments["act_layer"]}"' if "act_layer" in arguments else ""
        notes.append(
            f'The weights also load into `timm.create_model("{named}"{act}, num_classes=0)`. The activation must be '
            "the one that the encoder was trained with: timm's default for this name may be another."
        )
    if config.image_size != own_size:
        notes.append(
            f"In training pictures came at {config.image_size} x {config.image_size} pixels: position embeddings are "
            f"those of that size here, resampled from {own_size} by transformers' rule."
        )
    if config.model_type.startswith("dinov2"):
        notes.append(
            f"Features are equal at {config.image_size} x {config.image_size} pixels. At other sizes timm resamples "
            "position embeddings in another way than transformers, with which the encoder was trained."
        )
    return tuple(notes)
