"""What is exported: the folder of a trained model, the stages that led to it, and its vision tower."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from hive_ds.errors import HiveError
from hive_ds.model.cascaded import block_number
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.identity import canonical_names, canonical_parts, read_tower
from hive_ds.model.vision import vision_class, vision_config_of
from hive_ds.stages import HIVE_STAGES, Stage


@dataclass(frozen=True)
class Source:
    """A trained model."""

    folder: Path
    """Weights, config and processor."""
    stages: tuple[Path, ...]
    """Folders of the stages of its run up to it, in order; empty for a model that lies in no run."""

    @property
    def stage_number(self) -> int | None:
        """Of the stage that trained it; None for a model that lies in no run."""
        return _number(self.stages[-1]) if self.stages else None

    @property
    def untrained(self) -> str | None:
        """Why its encoder is still the one that the run started from; None where it is not, or nothing is known."""
        number = self.stage_number
        stage = next((one for one in HIVE_STAGES if one.number == number), None)
        if stage is None or "vision_encoder" in stage.trains:
            return None
        trainer = next(one.number for one in HIVE_STAGES if "vision_encoder" in one.trains)
        return (
            f"stage {number} does not train the vision encoder (stage {trainer} does): these are the weights that the "
            "run started from"
        )


@dataclass(frozen=True)
class Tower:
    """A vision encoder with the weights, dtypes included, of a trained model."""

    encoder: PreTrainedModel
    routes: tuple[tuple[int, int], ...]
    """Vision block, LLM layer; empty for a cascaded model."""
    last_block: int
    """The deepest block that the LLM saw, from 1: no gradient reached what comes after it."""


def find_source(path: str | Path, stages: Sequence[Stage] = HIVE_STAGES) -> Source:
    """The model in ``path``, or in a stage's folder, or of the last finished one of ``stages`` in a run's folder.

    Raises:
        HiveError: none of these is there.
    """
    path = Path(path)
    if not path.is_dir():
        raise HiveError(f"{path}: no such folder; expected that of a run, a stage or a model")
    if not _in_run(path) and _in_run(path.resolve()):  # a link to it, or "."
        path = path.resolve()
    if (path / "config.json").is_file():
        return Source(path, _stages_up_to(path.parent) if path.name == "model" and _in_run(path) else ())
    own = _number(path)
    candidates = _stages(path) or ([] if own is None else [(own, path)])
    done = {number: stage for number, stage in candidates if (stage / "DONE").is_file()}
    wanted = [stage.number for stage in stages]
    finished = [stage for number, stage in done.items() if number in wanted]
    if not finished and done:
        numbers, expected = (", ".join(map(str, stages)) for stages in (done, wanted))
        raise HiveError(
            f"{path}: of its stages {numbers} are finished; expected one of {expected}, which hold such a model"
        )
    if not finished:
        raise HiveError(f"{path}: holds neither a model (config.json) nor a finished stage (DONE, or stageN/DONE)")
    return Source(finished[-1] / "model", _stages_up_to(finished[-1]))


def model_folder(source: str | Path) -> Path:
    """The folder of a model's weights, as `find_source` finds it; of stages 1 to 3.

    Raises:
        HiveError: it is not there.
    """
    return find_source(source).folder


def _stages(run: Path) -> list[tuple[int, Path]]:
    numbers = ((_number(path), path) for path in run.glob("stage*"))
    return sorted((number, path) for number, path in numbers if number is not None)


def _in_run(folder: Path) -> bool:
    """Whether the names say that it is a stage's folder, or that of a stage's model."""
    return _number(folder) is not None or (folder.name == "model" and _number(folder.parent) is not None)


def _number(stage: Path) -> int | None:
    match = re.fullmatch(r"stage(\d+)", stage.name)
    return int(match[1]) if match else None


def _stages_up_to(stage: Path) -> tuple[Path, ...]:
    stages = [path for _, path in _stages(stage.parent)]
    return tuple(stages[: stages.index(stage) + 1])


def load_tower(folder: Path) -> Tower:
    """The vision encoder of a HIVE or a LLaVA-style model; its other weights are not read.

    Raises:
        HiveError: the folder holds no such model, or weights of its encoder are missing or too many.
    """
    config = read_config(folder)
    vision = vision_config_of(config)
    if isinstance(config, HiveConfig):
        routes = tuple(zip(config.vision_blocks, config.language_layers, strict=True))
        last_block = max(config.vision_blocks)
    elif isinstance(getattr(config, "vision_feature_layer", None), int):
        routes = ()
        last_block = block_number(config.vision_feature_layer, vision.num_hidden_layers)
    else:
        raise HiveError(f"{folder} holds a {config.model_type} model; expected a HIVE or a LLaVA-style one")
    encoder = vision_class(vision)._from_config(vision)
    _fill(encoder, folder)
    return Tower(encoder.eval(), routes, last_block)


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a saved model.

    Raises:
        HiveError: there is none, or transformers does not know it.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(folder)
        return HiveConfig.from_dict(values) if values["model_type"] == "hive" else AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:  # a list, say, where an object is expected
        raise HiveError(f"{folder} has no config.json of a model: {str(error).splitlines()[0]}") from error


def _fill(encoder: PreTrainedModel, folder: Path) -> None:
    """Take the folder's tensors as they are; names may be those of transformers 4 or 5."""
    found = dict(part for name, tensor in read_tower(folder) for part in canonical_parts(name, tensor))
    wanted = {name: canonical_names(name) for name in encoder.state_dict()}
    expected = {part for parts in wanted.values() for part in parts}
    if expected != set(found):
        raise HiveError(
            f"{folder} does not hold its vision encoder: missing {sorted(expected - set(found))}, "
            f"unexpected {sorted(set(found) - expected)}"
        )
    state = {
        name: found[parts[0]] if len(parts) == 1 else torch.cat([found[part] for part in parts])
        for name, parts in wanted.items()
    }
    encoder.load_state_dict(state, assign=True)
