"""Models from Hugging Face names and folders, and strict hand-over of weights between stages.

Weights are read from safetensors only (or, for a base model that has none, by transformers with ``weights_only=True``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from hive_ds.config import ModelConfig
from hive_ds.errors import HiveError
from hive_ds.model.attention import HiveAttention
from hive_ds.model.attention_backends import set_vision_attention
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.language import check_language_model
from hive_ds.model.vision import vision_class, vision_config_of


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by parameter name."""

    loaded: tuple[str, ...]
    copied: tuple[str, ...]
    """Set from another parameter of the model because the folder has none: image_k_proj, image_v_proj."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        """One line of counts, with the names of what is not simply loaded."""
        parts = [f"loaded {len(self.loaded)}"]
        for label in ("copied", "missing", "unexpected"):
            names = getattr(self, label)
            parts.append(f"{label} {len(names)}" + (f" ({_shortened(names)})" if names else ""))
        return "weights: " + ", ".join(parts)


def build_model(
    config: ModelConfig, *, image_kv: str, max_length: int | None = None, dtype: torch.dtype = torch.float32
) -> HiveForCausalLM:
    """Join the recipe's two base models; projectors and q/k norms start fresh, image projections as copies of k and v.

    Args:
        config: the recipe's ``model`` section.
        image_kv: ``"shared"`` (stage 1) or ``"own"``.
        max_length: longest text that training will see.
        dtype: of all weights.

    Raises:
        HiveError: a folder is missing, a model is not supported, or the routes do not fit.
    """
    vision_encoder = load_vision_encoder(config.vision_encoder, dtype)
    language_model = load_language_model(config.language_model, dtype)
    check_language_model(language_model, max_length=max_length)
    model = HiveForCausalLM(
        HiveConfig(
            vision_config=vision_encoder.config,
            text_config=language_model.config,
            vision_blocks=config.routes.vision_blocks,
            language_layers=config.routes.language_layers,
            qk_norm=config.qk_norm,
            rope=config.rope,
            image_kv=image_kv,
            attention_backend=config.attention_backend,
            text_attention_backend=config.text_attention_backend,
        ),
        vision_encoder,
        language_model,
    )
    set_vision_attention(model, config.vision_attention)
    for attention in _own_image_attentions(model).values():
        attention.copy_image_projections()
    return model.to(dtype)


def load_model(
    folder: str | Path, config: ModelConfig, *, image_kv: str, dtype: torch.dtype = torch.float32
) -> tuple[HiveForCausalLM, LoadReport]:
    """The model that an earlier stage saved, ready for a stage with ``image_kv``.

    Raises:
        HiveError: the folder holds no HIVE model, or one joined in another way than ``config`` says.
    """
    folder = Path(folder)
    saved = HiveConfig.from_dict(_read_config(str(folder), "HIVE model"))
    wanted = {
        "vision_blocks": list(config.routes.vision_blocks),
        "language_layers": list(config.routes.language_layers),
        "qk_norm": config.qk_norm,
        "rope": config.rope,
    }
    for name, value in wanted.items():
        if getattr(saved, name) != value:
            raise HiveError(
                f"{folder} was saved with {name} {getattr(saved, name)}, but the recipe says {value}; use the recipe "
                "that it was trained with"
            )
    saved.image_kv = image_kv
    saved.attention_backend = config.attention_backend
    saved.text_attention_backend = config.text_attention_backend
    model = HiveForCausalLM(saved).to(dtype)
    set_vision_attention(model, config.vision_attention)
    return model, load_weights(model, folder)


def load_weights(model: HiveForCausalLM, folder: str | Path) -> LoadReport:
    """Load the safetensors of ``folder`` by name, strictly.

    A model with its own image projections takes them from k_proj and v_proj where the folder has none (stage 1's).

    Raises:
        HiveError: no weights in the folder, a name missing or unexpected, or a shape that differs.
    """
    own = {_canonical(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    loaded, unexpected = [], []
    with torch.no_grad():
        for file in _weight_files(Path(folder)):
            with safe_open(file, framework="pt") as tensors:
                for saved_name in tensors.keys():  # noqa: SIM118 (not a dict)
                    name = _canonical(saved_name)
                    if name not in own:
                        unexpected.append(name)
                        continue
                    _copy(own[name], tensors.get_tensor(saved_name), name, folder)
                    loaded.append(name)
    copied = _copy_missing_image_projections(model, set(loaded))
    have = {own[name].data_ptr() for name in (*loaded, *copied)}
    missing = sorted(name for name, tensor in own.items() if tensor.data_ptr() not in have)
    report = LoadReport(tuple(sorted(loaded)), copied, tuple(missing), tuple(sorted(unexpected)))
    if not loaded or missing or unexpected:
        raise HiveError(f"{folder} does not hold this model's weights; {report}")
    return report


def load_vision_encoder(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The vision tower of a checkpoint (its text tower, if any, is left out).

    HiveError where the checkpoint lacks weights of it, which transformers would start at random.
    """
    values = _read_config(name, "vision encoder")
    config = vision_config_of(AutoConfig.for_model(**values))
    tower, report = vision_class(config).from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    if missing := tuple(sorted(report["missing_keys"])):
        raise HiveError(f"vision encoder {name!r} lacks {len(missing)} weights of its tower ({_shortened(missing)})")
    return tower


def load_language_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal LM; MobileLLM checkpoints load as Llama, without their remote code."""
    values = _read_config(name, "language model")
    if values["model_type"] == "mobilellm":
        return AutoModelForCausalLM.from_pretrained(name, config=_mobilellm_config(values), dtype=dtype)
    try:
        config = AutoConfig.for_model(**values)
        return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
    except ValueError as error:
        raise HiveError(f"language model {name!r} of type {values['model_type']!r} does not load: {error}") from error


def _mobilellm_config(values: dict) -> LlamaConfig:
    if values.get("layer_sharing"):
        raise HiveError(
            "this MobileLLM shares weights between layers (layer_sharing); only the plain ones load as Llama"
        )
    rest = {key: value for key, value in values.items() if key not in ("model_type", "auto_map", "share_embedding")}
    return LlamaConfig(**{**rest, "tie_word_embeddings": values.get("share_embedding", True)})


def _read_config(name: str, what: str) -> dict:
    """``config.json`` of a Hugging Face name or a folder; a path that does not exist is not taken for a hub name."""
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise HiveError(f"{what} folder {name} does not exist")
    try:
        values, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise HiveError(f"{what} {name!r} has no readable config.json: {str(error).splitlines()[0]}") from error
    if "model_type" not in values:
        raise HiveError(f"{what} {name!r}: its config.json names no model_type; expected a Hugging Face model")
    return values


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise HiveError(f"{folder} holds no model.safetensors; expected a folder saved by an earlier stage")


def _canonical(name: str) -> str:
    """transformers 4 nests SigLIP and CLIP towers one level deeper than transformers 5; saved names use neither."""
    return name.replace("vision_encoder.vision_model.", "vision_encoder.", 1)


def _copy(parameter: Tensor, saved: Tensor, name: str, folder: str | Path) -> None:
    if parameter.shape != saved.shape:
        raise HiveError(
            f"{folder} holds another model: {name} has shape {tuple(saved.shape)}, expected {tuple(parameter.shape)}"
        )
    parameter.copy_(saved)


def _own_image_attentions(model: HiveForCausalLM) -> dict[str, HiveAttention]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, HiveAttention) and hasattr(module, "image_k_proj")
    }


def _copy_missing_image_projections(model: HiveForCausalLM, loaded: set[str]) -> tuple[str, ...]:
    copied: list[str] = []
    for prefix, attention in _own_image_attentions(model).items():
        names = [
            f"{prefix}.{child}.{parameter}"
            for child in ("image_k_proj", "image_v_proj")
            for parameter, _ in getattr(attention, child).named_parameters()
        ]
        if not loaded.intersection(names):
            attention.copy_image_projections()
            copied += names
    return tuple(copied)


def _shortened(names: tuple[str, ...], limit: int = 4) -> str:
    more = "" if len(names) <= limit else f", and {len(names) - limit} more"
    return ", ".join(names[:limit]) + more
