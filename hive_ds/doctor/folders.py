"""Data folders, base models and the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hive_ds.config import Recipe
from hive_ds.doctor.findings import Finding
from hive_ds.errors import HiveError


def data_folders(recipe: Recipe) -> list[tuple[str, str]]:
    """The data folders that a recipe names, each once, behind the first key that names it."""
    found: dict[str, str] = {}
    for stage in recipe.stages:
        data = recipe.data_of(stage)
        train = [data.train] if isinstance(data.train, str) else list(data.train)
        held_out = [(key, getattr(data, key)) for key in ("validation", "text_validation", "questions")]
        for key, folder in [*(("train", one) for one in train), *held_out]:
            if folder:
                found.setdefault(folder, f"data.{key}")
    return [(key, folder) for folder, key in found.items()]


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
        advice = again if Path(folder).is_dir() else "name a folder of MDS shards (hive-ds data convert makes one)"
        return Finding("data", key, "problem", str(error), advice)
    return Finding("data", key, "ok", f"{folder}: {len(shards):,} samples in {len(shards.shards)} shards")


def check_models(recipe: Recipe) -> Iterator[Finding]:
    """Whether the base models that a recipe names are here."""
    named = {"model.vision_encoder": recipe.model.vision_encoder, "model.language_model": recipe.model.language_model}
    if recipe.vlm is not None:
        named["vlm.language_model"] = recipe.vlm.language_model
    for key, name in named.items():
        if Path(name).is_dir():
            yield Finding("models", key, "ok", name)
        elif _cached(name):
            yield Finding("models", key, "ok", f"{name}, in the hub's cache")
        else:
            said = f"{name} is neither a folder nor in the hub's cache"
            fetch = f"hf download {name} where there is a network, with HF_HOME on a disk that all hosts see"
            advice = f"name a folder that is there (--set {key}=FOLDER), or {fetch}"
            yield Finding("models", key, "warning", said, advice)


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
