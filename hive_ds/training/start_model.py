"""The model that a stage starts with, and its processor: joined afresh, or what an earlier stage has left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hive_ds.config import ModelConfig, Recipe
from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.aspect import with_aspect
from hive_ds.errors import HiveError
from hive_ds.export import export_encoder
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.cascaded import CascadedForCausalLM, processor_values
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.identity import folder_sha256, weights_sha256
from hive_ds.model.loading import (
    build_cascaded,
    build_model,
    generating_part,
    load_cascaded,
    load_model,
    load_vision_encoder,
    read_language_config,
    read_vision_config,
)
from hive_ds.model.routes import early_end
from hive_ds.model.unread import unread_model
from hive_ds.processing import HiveProcessor
from hive_ds.stages import HIVE_STAGES, VLM_STAGES
from hive_ds.training.distributed import World, from_main
from hive_ds.training.origin import changed_bases
from hive_ds.training.run_folder import StageFolder


def start_model(
    recipe: Recipe, folder: StageFolder, world: World, say: Callable[[str], None]
) -> tuple[TrainedModel, HiveProcessor]:
    """The model that the stage of ``folder`` starts with, and its processor; every rank calls it.

    Rank 0 reads the weights; the others make the same model without, and get them from `hive_ds.training.engine`.
    Stages 4 and 5 also check that the encoder in their model is the one that the recipe says.

    Raises:
        HiveError: an earlier stage is not finished, a model is missing or does not fit the recipe.
    """
    judges = folder.stage.number in [stage.number for stage in VLM_STAGES]
    section = recipe.vlm_model(_encoder_source(recipe, folder, world, say)) if judges else recipe.model
    weights = folder.start_weights()
    processor = _processor(recipe, folder, section, weights)
    model = _read(recipe, folder, section, weights, processor, say) if world.is_main else None
    said = from_main((model.config, generating_part(model).generation_config) if model is not None else None)
    if model is None:
        config, generation_config = said
        model = unread_model(config, generation_config, section)
    if isinstance(model, CascadedForCausalLM):
        processor.stock = processor_values(model.config)
        if judges and weights is not None:
            _check_encoder(model, section.vision_encoder, weights, world)
    model.language_loss.backend = recipe.model.language_loss
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train(), processor


def _read(
    recipe: Recipe,
    folder: StageFolder,
    section: ModelConfig,
    weights: Path | None,
    processor: HiveProcessor,
    say: Callable[[str], None],
) -> TrainedModel:
    """The model with its weights, of an earlier stage if there is one."""
    torch.manual_seed(recipe.training.seed)
    if weights is None:
        model = _build(recipe, folder, section, processor)
        if isinstance(model, HiveForCausalLM) and (note := _early_end(model)):
            say(f"note: {note}")
        return model
    model, report = _load(recipe, folder, section, weights)
    say(f"{weights}: {report}")
    for line in changed_bases(weights.parent / "recipe.yaml", recipe, folder.stage):
        say(f"warning: {weights} goes on, made with {line}")
    return model


def _build(recipe: Recipe, folder: StageFolder, section: ModelConfig, processor: HiveProcessor) -> TrainedModel:
    if section.kind == "cascaded":
        return build_cascaded(section, image_token_id=processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    max_length = recipe.data_of(folder.stage.name).max_length
    return build_model(section, image_kv=folder.stage.image_kv, max_length=max_length)


def _early_end(model: HiveForCausalLM) -> str:
    config = model.config
    depths = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    return early_end(config.vision_blocks, config.language_layers, *depths)


def _load(recipe: Recipe, folder: StageFolder, section: ModelConfig, weights: Path) -> tuple[TrainedModel, object]:
    if section.kind == "cascaded":
        return load_cascaded(weights, section)
    max_length = recipe.data_of(folder.stage.name).max_length
    return load_model(weights, section, image_kv=folder.stage.image_kv, max_length=max_length)


def _processor(recipe: Recipe, folder: StageFolder, section: ModelConfig, weights: Path | None) -> HiveProcessor:
    data = recipe.data_of(folder.stage.name)
    if weights is None:
        read_vision_config(section.vision_encoder)  # says in fewer words than a processor's reader what is wrong
        read_language_config(section.language_model)
        parts = HiveProcessor.from_base_models(section.vision_encoder, section.language_model)
    else:
        parts = HiveProcessor.from_pretrained(weights)
    return HiveProcessor(with_aspect(parts.image_processor, data.image_aspect), parts.tokenizer, data.image_position)


def _encoder_source(recipe: Recipe, folder: StageFolder, world: World, say: Callable[[str], None]) -> str:
    """The encoder that stages 4 and 5 judge: the recipe's, or the run's own, exported if that is not done yet.

    Raises:
        HiveError: the stages that train it are not finished, or RUN/encoder holds another one.
    """
    assert recipe.vlm is not None
    if recipe.vlm.vision_encoder is not None:
        return recipe.vlm.vision_encoder
    last = max(stage.number for stage in HIVE_STAGES if stage.name in recipe.stages)
    trained = folder.model_of(last)
    if world.is_main:
        if not (folder.encoder / "config.json").is_file():
            report = export_encoder(trained, folder.encoder)
            say(f"{report.folder}: exported, features equal to {report.largest_difference:.1e}")
        found, expected = folder_sha256(folder.encoder), folder_sha256(trained)
        if found != expected:
            raise HiveError(
                f"{folder.encoder} holds another encoder than {trained} (SHA-256 {found}, expected {expected}); remove "
                "it, and it is exported again"
            )
    from_main(None)  # the others wait
    return str(folder.encoder)


def _check_encoder(model: CascadedForCausalLM, source: str, weights: Path, world: World) -> None:
    """Refuse a model whose encoder is not that of ``source``.

    Raises:
        HiveError: names both.
    """
    expected = from_main(weights_sha256(load_vision_encoder(source).state_dict().items()) if world.is_main else None)
    if model.config.vision_sha256 != expected:
        raise HiveError(
            f"{weights} was made with the encoder of SHA-256 {model.config.vision_sha256}, but {source} has "
            f"{expected}; run stage 4 again in a new run folder, or put the encoder back"
        )
