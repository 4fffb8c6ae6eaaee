"""Data folders, base models and the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hive_ds.config import Recipe
from hive_ds.cost.known_models import KNOWN_MODELS
from hive_ds.doctor.findings import Finding
from hive_ds.errors import HiveError
from hive_ds.model.routes import Routes, early_end
from hive_ds.names import how_made, names_folder
from hive_ds.stages import VLM_STAGES

STAGES_4_AND_5 = tuple(stage.name for stage in VLM_STAGES)


@dataclass
class DataFolder:
    """A data folder that a recipe names."""

    key: str
    """The first one that names it."""
    stages: tuple[str, ...]
    """Names of the stages that read it."""


def data_folders(recipe: Recipe) -> dict[str, DataFolder]:
    """The data folders that the stages of a recipe read."""
    found: dict[str, DataFolder] = {}
    for stage, config in recipe.stages.items():
        data = recipe.data_of(stage)
        for key in ("train", "validation", "text_validation", "questions"):
            value = getattr(data, key)
            own = config.data is not None and value != getattr(recipe.data, key)
            for folder in [value] if isinstance(value, str) else value or ():
                one = found.setdefault(folder, DataFolder(f"{f'stages.{stage}.' * own}data.{key}", ()))
                one.stages = (*dict.fromkeys((*one.stages, stage)),)
    return found


def check_data(folder: str, key: str) -> Finding:
    """Whether the index, the files it lists and a few samples of a folder can be read."""
    if "://" in folder:
        advice = "try it: hive-ds data speed, or download a shard with your object store's own tool"
        return Finding("data", key, "warning", f"{folder} is remote and was not looked at", advice)
    try:
        from hive_ds.data.images import decode_image
        from hive_ds.data.mds.reading import open_folder
    except ImportError as error:
        return Finding("data", key, "problem", f"{folder}: {error}", 'pip install -e ".[streaming]"')
    try:
        shards = open_folder(folder)
        if not len(shards):
            raise HiveError(f"data folder {folder}: lists no samples")
        for shard in shards.shards:
            present = [file for file in (shard.raw, shard.zipped) if file and file.path.is_file()]
            if not present or any(file.path.stat().st_size != file.bytes for file in present):
                raise HiveError(f"shard {shard.name} of {folder}: missing, or not as long as the index says")
        for number in sorted({0, len(shards) // 2, len(shards) - 1}):
            for image in shards.get(number).images:
                decode_image(image)
    except (HiveError, OSError) as error:
        again = f"convert again, or copy the shards again from a good copy; hive-ds data verify {folder} says more"
        name = how_made(folder) or "name a folder of MDS shards (hive-ds data convert makes one)"
        advice = again if Path(folder).is_dir() else name
        return Finding("data", key, "problem", str(error), advice)
    return Finding("data", key, "ok", f"{folder}: {len(shards):,} samples in {len(shards.shards)} shards")


def check_models(recipe: Recipe) -> Iterator[Finding]:
    """Whether the base models that a recipe's stages start from are here."""
    named = {}
    if _pretrains(recipe):
        named["model.vision_encoder"] = recipe.model.vision_encoder
        named["model.language_model"] = recipe.model.language_model
    if recipe.vlm is not None and any(stage in recipe.stages for stage in STAGES_4_AND_5):
        named["vlm.language_model"] = recipe.vlm.language_model
        if recipe.vlm.vision_encoder is not None:
            named["vlm.vision_encoder"] = recipe.vlm.vision_encoder
    for key, name in named.items():
        choose = f"name a folder that is there (--set {key}=FOLDER)"
        if Path(name).expanduser().is_dir():
            yield Finding("models", key, "ok", name)
        elif names_folder(name):
            judges = STAGES_4_AND_5 if key.startswith("vlm.") else ()
            yield Finding("models", key, "problem", f"{name}: no such folder", how_made(name) or choose, judges)
        elif _cached(name):
            yield Finding("models", key, "ok", f"{name}, in the hub's cache")
        else:
            said = f"{name} is neither a folder nor in the hub's cache"
            fetch = f"hf download {name} where there is a network, with HF_HOME on a disk that all hosts see"
            yield Finding("models", key, "warning", said, f"{choose}, or {fetch}")


def check_routes(recipe: Recipe) -> Iterator[Finding]:
    """Whether the routes fit the depths of both models, where those are known here."""
    model, routes = recipe.model, recipe.model.routes
    if routes is None or not _pretrains(recipe) or not (_known(model.vision_encoder) and _known(model.language_model)):
        return
    from hive_ds.cost.model import text_config, vision_config

    lists = routes.vision_blocks, routes.language_layers
    try:
        vision, text = vision_config(model.vision_encoder), text_config(model.language_model)
    except (HiveError, ValueError) as error:
        yield Finding("models", "model", "problem", str(error), "name another, or fetch it again: hf download NAME")
        return
    try:
        blocks, layers = vision.num_hidden_layers, text.num_hidden_layers
        Routes.build(*lists, num_blocks=blocks, num_layers=layers)
    except (HiveError, ValueError) as error:
        advice = "write routes that both models have, or model.routes: N, which spreads N of them"
        yield Finding("models", "model.routes", "problem", str(error), advice)
    else:
        note = early_end(*lists, blocks, layers)
        said = f"{len(lists[0])} routes from {blocks} vision blocks to {layers} language layers"
        yield Finding("models", "model.routes", "ok", f"{said}; note: {note}" if note else said)


def _pretrains(recipe: Recipe) -> bool:
    return any(stage not in STAGES_4_AND_5 for stage in recipe.stages)


def _known(name: str) -> bool:
    """Whether the model's config can be read without a network."""
    return Path(name).expanduser().is_dir() or name in KNOWN_MODELS or (not names_folder(name) and _cached(name))


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # a path, of a folder that is not there
        return False


def check_run(run: Path) -> Iterator[Finding]:
    """What is in the folder of a run, and whether it can go on: the disk is `machine.check_disk`'s."""
    from hive_ds.training.checkpoint_files import faults_of, step_folders

    stages = sorted(path for path in run.glob("stage*") if path.is_dir())
    if not stages:
        yield Finding("run", str(run), "ok", "no stage yet")
    for stage in stages:
        if (stage / "DONE").is_file():
            yield Finding("run", stage.name, "ok", "done")
            continue
        if (stage / "STOP").is_file():
            advice = f"rm {stage / 'STOP'}, or the stage stops after its next step"
            yield Finding("run", stage.name, "warning", "a file STOP is there", advice)
        faults = {one: faults_of(one, hashes=False) for one in step_folders(stage)}
        yield from _latest(stage, faults)


def _latest(stage: Path, faults: dict[Path, list[str]]) -> Iterator[Finding]:
    """What a resume would take, of checkpoints newest first."""
    whole = next((one for one, found in faults.items() if not found), None)
    bad = [f"{one.name}: {found[0]}" for one, found in faults.items() if found]
    if bad:
        advice = f"hive-ds checkpoint verify {stage}; a resume passes over it, and it may be removed"
        yield Finding("run", stage.name, "warning", f"not whole: {'; '.join(bad)}", advice)
    if whole is not None:
        size = sum(file.stat().st_size for file in whole.iterdir() if file.is_file())
        yield Finding("run", stage.name, "ok", f"a resume takes {whole.name} ({size / 1e9:.2f} GB; hashes not read)")
    elif bad:
        advice = f"copy one back from a backup, or empty {stage} to begin again"
        yield Finding("run", stage.name, "problem", "no whole checkpoint", advice)
    else:
        yield Finding("run", stage.name, "ok", "no checkpoint yet: it starts at step 0")
