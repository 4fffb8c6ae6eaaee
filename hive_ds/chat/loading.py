"""A trained model ready to answer: which folder, on which device, in which dtype, with which template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from hive_ds.errors import HiveError, told_as
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.loading import load_any
from hive_ds.processing import HiveProcessor
from hive_ds.stages import stage_by_number


@dataclass(frozen=True)
class ChatModel:
    """A model in eval mode with its processor.

    ``template`` is ``chat``, or ``plain`` for a model that has learned captions alone.
    """

    folder: Path
    model: TrainedModel
    processor: HiveProcessor
    template: str

    def __str__(self) -> str:
        """One line: what it is and where it runs."""
        kind = "answers questions" if self.template == "chat" else "gives captions (template plain)"
        return f"{self.folder} on {self.model.device}, {str(self.model.dtype).removeprefix('torch.')}: {kind}"


def load_chat_model(checkpoint: str | Path) -> ChatModel:
    """The model of a run (its last finished stage), of one stage, or of a model folder.

    It runs on the GPU in bf16 if there is one, else on the CPU in fp32.

    Raises:
        HiveError: no such folder, or no model in it that answers.
    """
    folder = chat_folder(Path(checkpoint))
    on_gpu = torch.cuda.is_available()
    model = load_any(folder, torch.bfloat16 if on_gpu else torch.float32)
    processor = HiveProcessor.from_pretrained(folder)
    return ChatModel(folder, model.to("cuda" if on_gpu else "cpu"), processor, template_of(folder, processor))


def chat_folder(checkpoint: Path) -> Path:
    """The model folder that ``checkpoint`` (a run, a stage or a model) stands for.

    Raises:
        HiveError: no such folder, or no model in it.
    """
    if not checkpoint.is_dir():
        raise HiveError(f"checkpoint {checkpoint}: no such folder; expected that of a run, a stage or a model")
    folder = next((one for one in _candidates(checkpoint) if (one / "config.json").is_file()), None)
    if folder is None:
        raise HiveError(
            f"checkpoint {checkpoint}: holds no model (config.json) and no finished stage (stageN/DONE with a model)"
        )
    return folder


def template_of(folder: Path, processor: HiveProcessor) -> str:
    """The template of the recipe that training leaves beside ``folder``; else ``chat`` if the tokenizer has one."""
    recipe, number = folder.parent / "recipe.yaml", _stage_number(folder.parent)
    if number is None or not recipe.is_file():
        return "chat" if processor.tokenizer.chat_template else "plain"
    with told_as(str(recipe), "the recipe that training leaves there"):
        values = yaml.safe_load(recipe.read_text())
        stage = values["stages"].get(stage_by_number(number).name, {})
        return str((stage.get("data") or values["data"])["template"])


def _candidates(checkpoint: Path) -> list[Path]:
    """Folders that may be the model of ``checkpoint``, the likeliest first."""
    stages = sorted((number, path) for path in checkpoint.glob("stage*") if (number := _stage_number(path)) is not None)
    finished = [path / "model" for _, path in reversed(stages) if (path / "DONE").is_file()]
    return [checkpoint, checkpoint / "model", *finished]


def _stage_number(folder: Path) -> int | None:
    match = re.fullmatch(r"stage(\d+)", folder.name)
    return int(match[1]) if match else None
