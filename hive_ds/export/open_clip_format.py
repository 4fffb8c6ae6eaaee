"""The encoder under the names of open_clip's image towers: ``model.visual.load_state_dict(...)``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BaseImageProcessor, PretrainedConfig

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
from hive_ds.export.names import OPEN_CLIP, rename
from hive_ds.export.parity import check_names, foreign_difference
from hive_ds.export.timm_format import find_named, import_timm, timm_arguments, timm_weights

CONFIG = "open_clip_vision.json"
SUPPORTED = "CLIP and SigLIP (and SigLIP2 of fixed resolution)"
ACTIVATIONS = {"gelu": False, "quick_gelu": True}
"""transformers' name -> open_clip's ``quick_gelu``, for CLIP."""
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""PIL's number -> open_clip's name; it resizes in no other way."""


def write(job: Job) -> Written:
    """Write weights under open_clip's names; compare features with its tower.

    Raises:
        HiveError: open_clip is not installed, or has no such tower.
    """
    try:
        import open_clip
    except ImportError as error:
        raise HiveError("open_clip is not installed; pip install 'hive-ds[open_clip]'") from error
    config = job.encoder.config
    if config.model_type == "siglip_vision_model":
        return _write_siglip(job, open_clip)
    if config.model_type == "clip_vision_model":
        return _write_clip(job, open_clip)
    raise refuse_family(config, "open_clip", SUPPORTED)


def _write_clip(job: Job, open_clip: Any) -> Written:
    config = job.encoder.config
    if config.hidden_act not in ACTIVATIONS:
        raise HiveError(f"hidden_act {config.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)} for open_clip")
    vision = open_clip.CLIPVisionCfg(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        head_width=config.hidden_size // config.num_attention_heads,
        mlp_ratio=mlp_ratio(config),
        patch_size=config.patch_size,
        image_size=config.image_size,
        norm_kwargs=None if config.layer_norm_eps == 1e-5 else {"eps": config.layer_norm_eps},
    )
    weights = rename(job.encoder.state_dict().items(), OPEN_CLIP)
    name, visual = _write_and_read(job, open_clip, vision, ACTIVATIONS[config.hidden_act], weights, lacks=("proj",))
    # Without its projection, the tower's output is transformers' pooled output.
    nn.init.eye_(visual.proj)
    note = (
        "`visual.proj`, the projection to the space shared with a text tower, is not in the file: HIVE does not train "
        "nor keep it. `load_state_dict` must name it alone as missing; features of blocks do not depend on it."
    )
    difference = foreign_difference(job.encoder, job.blocks, visual)
    return Written(name, _usage(job, strict=False), difference, "fp64", (note, *_preprocessing_notes(job)))


def _write_siglip(job: Job, open_clip: Any) -> Written:
    config, timm = job.encoder.config, import_timm()
    arguments = timm_arguments(config)
    named = find_named(timm, config, arguments)
    if named is None:
        raise HiveError(
            "open_clip builds SigLIP towers by names of timm's, whole and with their pooling head; timm has no such "
            f"model of {config.num_hidden_layers} blocks, width {config.hidden_size}, {config.image_size} pixels; "
            "export it with --format timm, which needs no name"
        )
    vision = open_clip.CLIPVisionCfg(
        timm_model_name=named, timm_pool="map", timm_proj="none", image_size=config.image_size
    )
    weights = {f"trunk.{name}": tensor for name, tensor in timm_weights(job.encoder).items()}
    name, visual = _write_and_read(job, open_clip, vision, False, weights)
    usage = _usage(job, strict=True, activation=_set_activation(visual, config))
    difference = foreign_difference(job.encoder, job.blocks, visual)
    return Written(name, usage, difference, "fp64", _preprocessing_notes(job))


def _write_and_read(
    job: Job, open_clip: Any, vision: Any, quick_gelu: bool, weights: dict[str, Tensor], *, lacks: tuple[str, ...] = ()
) -> tuple[str, Any]:
    """Write weights and config; what open_clip calls the tower, and the one that it makes of both."""
    save_file(weights, job.folder / WEIGHTS, metadata={"format": "pt"})
    names = _names(open_clip, vision, quick_gelu)
    _write_config(job, vision, quick_gelu, names)
    visual = _tower(open_clip, vision, quick_gelu, job.encoder.config.hidden_size)
    found = visual.load_state_dict(load_file(job.folder / WEIGHTS), strict=False)
    check_names([name for name in found.missing_keys if name not in lacks], found.unexpected_keys, "open_clip")
    return f"open_clip {names[0] if names else 'vision tower'}", visual


def _set_activation(visual: nn.Module, config: PretrainedConfig) -> str:
    """Give the tower the encoder's tanh form of GELU, which open_clip cannot be told; the Python that does it."""
    mlps = [module for module in visual.modules() if isinstance(getattr(module, "act", None), nn.Module)]
    if config.hidden_act != "gelu_pytorch_tanh":
        raise HiveError(f"hidden_act {config.hidden_act!r}: expected gelu_pytorch_tanh, as every SigLIP has")
    if all(getattr(mlp.act, "approximate", "tanh") == "tanh" for mlp in mlps):
        return ""
    for mlp in mlps:
        mlp.act = nn.GELU(approximate="tanh")
    return (
        "# open_clip builds this tower with exact GELU; the encoder was trained with its tanh form.\n"
        "for module in visual.modules():\n"
        '    if hasattr(module, "act"):\n'
        '        module.act = torch.nn.GELU(approximate="tanh")\n'
    )


def _tower(open_clip: Any, vision: Any, quick_gelu: bool, width: int) -> Any:
    """The image tower of a whole model, whose text tower is as small as can be."""
    text = open_clip.CLIPTextCfg(context_length=4, vocab_size=8, width=64, heads=1, layers=1)
    return open_clip.CLIP(width, vision, text, quick_gelu=quick_gelu).visual.eval()


def _names(open_clip: Any, vision: Any, quick_gelu: bool) -> list[str]:
    """open_clip's models that have this image tower, those with its usual text tower first."""
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    names = [
        name
        for name, config in configs.items()
        if open_clip.CLIPVisionCfg(**config["vision_cfg"]) == vision and config.get("quick_gelu", False) == quick_gelu
    ]
    return sorted(names, key=lambda name: (not name.startswith("ViT-"), len(name)))


def _write_config(job: Job, vision: Any, quick_gelu: bool, names: list[str]) -> None:
    """``open_clip_vision.json``: the tower, and what becomes of a picture before it, in open_clip's words."""
    description = {
        "models": names,
        "quick_gelu": quick_gelu,
        "vision_cfg": {name: value for name, value in asdict(vision).items() if value is not None},
        "preprocess_cfg": _preprocessing(job.processor, job.encoder.config.image_size),
    }
    (job.folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def _preprocessing(processor: BaseImageProcessor, image_size: int) -> dict[str, Any]:
    """Arguments of open_clip's ``image_transform``: the image processor's doing, at the encoder's own size.

    Raises:
        HiveError: open_clip cannot resize in its way.
    """
    if (resample := int(processor.resample)) not in INTERPOLATIONS:
        raise HiveError(
            f"resample {resample} of the image processor: expected 2 (bilinear) or 3 (bicubic) for open_clip; export "
            "it with --format timm"
        )
    settings = {
        "image_size": image_size,
        "interpolation": INTERPOLATIONS[resample],
        "resize_mode": "shortest" if getattr(processor, "do_center_crop", False) else "squash",
        **mean_and_std(processor),
    }
    if getattr(processor, "do_pad", False):
        settings |= {"resize_mode": "longest", "fill_color": [int(255 * channel) for channel in processor.image_mean]}
    return settings


def _preprocessing_notes(job: Job) -> tuple[str, ...]:
    shortest, size = job.processor.size.get("shortest_edge"), job.encoder.config.image_size
    if shortest in (None, size):
        return ()
    return (
        f"In training a picture's shorter side became {shortest} pixels, of which the middle {size} were kept; "
        f'open_clip makes it {size}. `transformers.AutoImageProcessor.from_pretrained("{job.name}")` does '
        "as in training.",
    )


def _usage(job: Job, *, strict: bool, activation: str = "") -> str:
    width = job.encoder.config.hidden_size
    found = foreign_features("visual", job.blocks[-1], '["image_intermediates"]')
    return (
        "import json\n\nimport open_clip\nimport torch\nfrom PIL import Image\n"
        "from safetensors.torch import load_file\n\n"
        f'with open("{job.name}/{CONFIG}") as file:\n    config = json.load(file)\n'
        'vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])\n'
        "text = open_clip.CLIPTextCfg(context_length=4, vocab_size=8, width=64, heads=1, layers=1)  # not used\n"
        f'visual = open_clip.CLIP({width}, vision, text, quick_gelu=config["quick_gelu"]).visual.eval()\n'
        f'visual.load_state_dict(load_file("{job.name}/{WEIGHTS}"){"" if strict else ", strict=False"})\n'
        f"{activation}"
        'preprocess = open_clip.image_transform(is_train=False, **config["preprocess_cfg"])\n'
        f"pixels = preprocess({PICTURE})[None]\n{found}"
    )
