"""What the writers of an exported folder share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel

from hive_ds.errors import HiveError

WEIGHTS = "model.safetensors"
SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Job:
    """One export."""

    encoder: PreTrainedModel
    """As it is to be written."""
    blocks: tuple[int, ...]
    """Whose features are compared, from 1."""
    processor: BaseImageProcessor
    folder: Path
    """To write into; it is there already."""
    name: str
    """Of the folder when it is done, for messages and the model card."""


@dataclass(frozen=True)
class Written:
    """What a writer has done, and found when it read it back."""

    architecture: str
    usage: str
    """Python that loads it and takes the features of the last block that the LLM saw, for the model card."""
    difference: float
    """Largest, between features before and after."""
    precision: str
    """In which they were compared."""
    notes: tuple[str, ...] = ()
    """What else a user must know, sentences for the model card."""


PICTURE = 'Image.open("picture.jpg").convert("RGB")'
"""What a card's lines look at."""


def foreign_features(call: str, last_block: int, after: str = "") -> str:
    """A card's lines that take a block's patches where blocks are counted from 0."""
    return (
        f"# Blocks are counted from 0 here: {last_block - 1} is block {last_block}, the last one that the LLM saw.\n"
        f"with torch.no_grad():\n    found = {call}.forward_intermediates(\n"
        f'        pixels, indices=[{last_block - 1}], output_fmt="NLC", intermediates_only=True\n    )\n'
        f"features = found{after}[0]  # (1, patches, width)"
    )


def refuse_family(config: PretrainedConfig, library: str, supported: str) -> HiveError:
    """The error for an encoder that has no form in ``library``."""
    return HiveError(
        f"a {config.model_type} encoder has no {library} form that gives equal features; {library} takes {supported}; "
        "export it with --format transformers"
    )


def mlp_ratio(config: PretrainedConfig) -> float:
    """Width of the MLP over that of the model; times the latter, and cut to an integer, it gives the former."""
    ratio = config.intermediate_size / config.hidden_size
    exact = int(config.hidden_size * ratio) == config.intermediate_size
    return ratio if exact else (config.intermediate_size + 0.5) / config.hidden_size


def mean_and_std(processor: BaseImageProcessor) -> dict[str, list[float]]:
    """Of the pixels, by channel."""
    return {"mean": list(processor.image_mean), "std": list(processor.image_std)}
