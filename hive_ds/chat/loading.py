"""A trained model ready to answer: which folder, on which device, in which dtype, with which template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from hive_ds.errors import told_as
from hive_ds.export.source import Source, find_source
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.loading import load_any
from hive_ds.processing import HiveProcessor
from hive_ds.stages import STAGES, stage_by_number


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
    source = find_source(checkpoint, STAGES)
    on_gpu = torch.cuda.is_available()
    model = load_any(source.folder, torch.bfloat16 if on_gpu else torch.float32)
    processor = HiveProcessor.from_pretrained(source.folder)
    return ChatModel(source.folder, model.to("cuda" if on_gpu else "cpu"), processor, template_of(source, processor))


def template_of(source: Source, processor: HiveProcessor) -> str:
    """The template of the recipe that training leaves in a stage; else ``chat`` if the tokenizer has one."""
    number = source.stage_number
    if number is None or not (recipe := source.stages[-1] / "recipe.yaml").is_file():
        return "chat" if processor.tokenizer.chat_template else "plain"
    with told_as(str(recipe), "the recipe that training leaves there"):
        values = yaml.safe_load(recipe.read_text())
        stage = values["stages"].get(stage_by_number(number).name, {})
        return str((stage.get("data") or values["data"])["template"])
