"""Models from Hugging Face names and folders, and strict hand-over of weights between stages.

Weights are read from safetensors only (or, for a base model that has none, by transformers with ``weights_only=True``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hive_ds.config import ModelConfig, RoutesConfig
from hive_ds.errors import HiveError, told_as
from hive_ds.model.attention_backends import set_vision_attention
from hive_ds.model.cascaded import CascadedForCausalLM, cascaded_config
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.identity import folder_sha256, weights_sha256
from hive_ds.model.language import check_window
from hive_ds.model.vision import vision_class, vision_config_of
from hive_ds.model.weights import LoadReport, load_weights, own_image_attentions, shortened
from hive_ds.names import does_not_exist, names_folder

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

WHOLE = "a whole model of Hugging Face"

Model = TypeVar("Model", bound=PreTrainedModel)


def build_model(config: ModelConfig, *, image_kv: str, max_length: int | None = None) -> HiveForCausalLM:
    """Join the recipe's two base models, in fp32; projectors and q/k norms start fresh, image projections as copies.

    Args:
        config: the recipe's ``model`` section.
        image_kv: ``"shared"`` (stage 1) or ``"own"``.
        max_length: longest text that training will see.

    Raises:
        HiveError: a folder is missing, a model is not supported, or the routes do not fit.
    """
    vision_encoder = load_vision_encoder(config.vision_encoder)
    language_model = load_language_model(config.language_model)
    joined = hive_config(config, vision_encoder.config, language_model.config, image_kv=image_kv)
    model = HiveForCausalLM(joined, vision_encoder, language_model)
    check_window(language_model.config, max_length)
    set_vision_attention(model, config.vision_attention)
    for attention in own_image_attentions(model).values():
        attention.copy_image_projections()
    return model


def hive_config(
    config: ModelConfig, vision_config: PretrainedConfig, text_config: PretrainedConfig, *, image_kv: str
) -> HiveConfig:
    """How the recipe joins an encoder and an LLM of these configs."""
    routes = _routes(config)
    return HiveConfig(
        vision_config=vision_config,
        text_config=text_config,
        vision_blocks=routes.vision_blocks,
        language_layers=routes.language_layers,
        qk_norm=config.qk_norm,
        rope=config.rope,
        image_kv=image_kv,
        attention_backend=config.attention_backend,
        text_attention_backend=config.text_attention_backend,
    )


def load_model(
    folder: str | Path, config: ModelConfig, *, image_kv: str, max_length: int | None = None
) -> tuple[HiveForCausalLM, LoadReport]:
    """The model that an earlier stage saved, in fp32, for a stage with ``image_kv`` and texts of ``max_length``.

    Raises:
        HiveError: the folder holds no HIVE model, or one joined in another way than ``config`` says, or of an LLM whose
            sliding window is shorter than the texts.
    """
    folder = Path(folder)
    saved, routes = HiveConfig.from_dict(_read_config(str(folder), "HIVE model")), _routes(config)
    wanted = {
        "vision_blocks": list(routes.vision_blocks),
        "language_layers": list(routes.language_layers),
        "qk_norm": config.qk_norm,
        "rope": config.rope,
    }
    for name, value in wanted.items():
        if getattr(saved, name) != value:
            raise HiveError(
                f"{folder} was saved with {name} {getattr(saved, name)}, but the recipe says {value}; use the recipe "
                "that it was trained with"
            )
    check_window(saved.text_config, max_length)
    saved.image_kv = image_kv
    saved.attention_backend = config.attention_backend
    saved.text_attention_backend = config.text_attention_backend
    model = without_random_weights(HiveForCausalLM, saved).float()
    set_vision_attention(model, config.vision_attention)
    _take_generation_config(model, folder)
    return model, load_weights(model, folder)


def build_cascaded(config: ModelConfig, *, image_token_id: int) -> CascadedForCausalLM:
    """Join an encoder and an LLM by a fresh projector, in fp32.

    Args:
        config: the recipe's ``model`` section, or what `hive_ds.config.Recipe.vlm_model` makes of its ``vlm``.
        image_token_id: of ``<image>`` in the LLM's tokenizer. Stock transformers looks it up among the LLM's
            embeddings, which get a row for it where they end before.

    Raises:
        HiveError: a folder is missing or a model is not supported.
    """
    vision_encoder = load_vision_encoder(config.vision_encoder)
    language_model = load_language_model(config.language_model)
    if image_token_id >= language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(image_token_id + 1)
    joined = cascaded_config(
        vision_encoder.config,
        language_model.config,
        feature_block=config.feature_block,
        image_token_id=image_token_id,
        vision_sha256=weights_sha256(vision_encoder.state_dict().items()),
    )
    model = CascadedForCausalLM(joined, vision_encoder, language_model, attention_backend=config.text_attention_backend)
    set_vision_attention(model, config.vision_attention)
    return model


def load_cascaded(folder: str | Path, config: ModelConfig) -> tuple[CascadedForCausalLM, LoadReport]:
    """The cascaded model that an earlier stage saved, in fp32.

    Raises:
        HiveError: the folder holds none, one that takes another block than ``config`` says, or whose encoder is not the
            one that it was made with.
    """
    saved = LlavaConfig.from_dict(_read_config(str(folder), "cascaded model"))
    if saved.vision_feature_layer != config.feature_block:
        raise HiveError(
            f"{folder} was saved with feature_block {saved.vision_feature_layer}, but the recipe says "
            f"{config.feature_block}; use the recipe that it was trained with"
        )
    return _load_cascaded(Path(folder), saved, config.text_attention_backend, config.vision_attention, torch.float32)


def load_any(folder: str | Path, dtype: torch.dtype = torch.float32) -> HiveForCausalLM | CascadedForCausalLM:
    """The model in ``folder`` in eval mode, HIVE's or a cascaded one; `HiveProcessor` reads the processor of either.

    Raises:
        HiveError: it holds neither, weights are missing or too many, or a cascaded model's encoder is not the one that
            it was made with.
    """
    values = _read_config(str(folder), "model")
    if values["model_type"] == "hive":
        return _load_hive(folder, dtype).eval()
    if values["model_type"] != "llava":
        raise HiveError(f"{folder} holds a {values['model_type']} model; expected one that this package has trained")
    return _load_cascaded(Path(folder), LlavaConfig.from_dict(values), "auto", "sdpa", dtype)[0].eval()


def without_random_weights(make: Callable[..., Model], *arguments: Any, **more: Any) -> Model:
    """A model whose weights are all read next, or never: to draw them takes 17 s of CPU time at the paper's size."""
    with no_init_weights():
        model = make(*arguments, **more)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()  # left out, too
    return model


def generating_part(model: HiveForCausalLM | CascadedForCausalLM) -> PreTrainedModel:
    """The module whose ``generation_config`` says how ``model`` answers."""
    return model if isinstance(model, HiveForCausalLM) else model.language_model


def _load_hive(folder: str | Path, dtype: torch.dtype) -> HiveForCausalLM:
    config = HiveConfig.from_pretrained(folder)
    config.attention_backend = config.text_attention_backend = "auto"  # not those of the machine that trained it
    with told_as(f"{folder} does not load", WHOLE):
        model, report = HiveForCausalLM.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    for what, key in (("lacks", "missing_keys"), ("holds unknown", "unexpected_keys")):
        if names := tuple(sorted(report[key])):
            raise HiveError(f"{folder} {what} {len(names)} weights of its HIVE model ({shortened(names)})")
    return model


def _load_cascaded(
    folder: Path, saved: LlavaConfig, backend: str, vision_attention: str, dtype: torch.dtype
) -> tuple[CascadedForCausalLM, LoadReport]:
    found, expected = folder_sha256(folder), getattr(saved, "vision_sha256", None)
    if found != expected:
        raise HiveError(
            f"{folder}: the vision encoder in it has SHA-256 {found}, but it was saved with one of {expected}; "
            "expected the same tower"
        )
    model = without_random_weights(CascadedForCausalLM, saved, attention_backend=backend).to(dtype)
    set_vision_attention(model, vision_attention)
    _take_generation_config(model, folder)
    return model, load_weights(model, folder)


def _take_generation_config(model: HiveForCausalLM | CascadedForCausalLM, folder: Path) -> None:
    """Let ``model`` answer by default as the one in ``folder``, if that says how."""
    if (folder / "generation_config.json").is_file():
        generating_part(model).generation_config = GenerationConfig.from_pretrained(folder)


def load_vision_encoder(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The vision tower of a checkpoint (its text tower, if any, is left out).

    HiveError where the checkpoint lacks weights of it, which transformers would start at random.
    """
    config = read_vision_config(name)
    with told_as(f"vision encoder {name!r} does not load", WHOLE):
        tower, report = vision_class(config).from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    if missing := tuple(sorted(report["missing_keys"])):
        raise HiveError(f"vision encoder {name!r} lacks {len(missing)} weights of its tower ({shortened(missing)})")
    return tower


def load_language_model(name: str) -> PreTrainedModel:
    """A causal LM, in fp32; MobileLLM checkpoints load as Llama, without their remote code.

    HiveError where the checkpoint lacks weights, which transformers would start at random, or does not load.
    """
    config = read_language_config(name)
    with told_as(f"language model {name!r} of type {config.model_type!r} does not load", WHOLE):
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    if missing := tuple(sorted(report["missing_keys"])):
        raise HiveError(f"language model {name!r} lacks {len(missing)} of its weights ({shortened(missing)})")
    return model


def read_vision_config(name: str) -> PretrainedConfig:
    """Config of the vision tower of a checkpoint, by its ``config.json`` alone."""
    values = _read_config(name, "vision encoder")
    with told_as(f"vision encoder {name!r} of type {values['model_type']!r} does not load", WHOLE):
        config = AutoConfig.for_model(**values)
    try:
        config = vision_config_of(config)
    except HiveError as error:
        raise HiveError(f"{name}: {error}") from error
    return _with_depth(config, f"vision encoder {name!r}")


def read_language_config(name: str) -> PretrainedConfig:
    """Config of a causal LM, by its ``config.json`` alone; that of a MobileLLM is a Llama's."""
    values = _read_config(name, "language model")
    if values["model_type"] == "mobilellm":
        return _mobilellm_config(values)
    with told_as(f"language model {name!r} of type {values['model_type']!r} does not load", WHOLE):
        config = AutoConfig.for_model(**values)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise HiveError(
            f"language model {name!r} of type {config.model_type!r} is none that transformers loads as a causal LM"
        )
    return _with_depth(config, f"language model {name!r}")


def _with_depth(config: PretrainedConfig, what: str) -> PretrainedConfig:
    """``config``, whose depth routes are counted by."""
    depth = getattr(config, "num_hidden_layers", None)
    if type(depth) is not int or depth < 1:
        raise HiveError(f"{what}: num_hidden_layers is {depth!r} in its config.json; expected a whole number above 0")
    return config


def _routes(config: ModelConfig) -> RoutesConfig:
    assert config.routes is not None, "a model of kind hive has routes"
    return config.routes


def _mobilellm_config(values: dict) -> LlamaConfig:
    if values.get("layer_sharing"):
        raise HiveError(
            "this MobileLLM shares weights between layers (layer_sharing); only the plain ones load as Llama"
        )
    rest = {key: value for key, value in values.items() if key not in ("model_type", "auto_map", "share_embedding")}
    return LlamaConfig(**{**rest, "tie_word_embeddings": values.get("share_embedding", True)})


def _read_config(name: str, what: str) -> dict:
    """``config.json`` of a Hugging Face name or a folder; a path that does not exist is not taken for a hub name."""
    if names_folder(name) and not Path(name).expanduser().is_dir():
        raise HiveError(f"{what} folder {name} {does_not_exist(name)}")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise HiveError(f"{what} folder {name} holds no config.json; expected a Hugging Face model")
    with told_as(f"{what} {name!r} has no readable config.json", "a Hugging Face model, in a folder or on the hub"):
        values, _ = PretrainedConfig.get_config_dict(name)
    if "model_type" not in values:
        raise HiveError(f"{what} {name!r}: its config.json names no model_type; expected a Hugging Face model")
    return values
