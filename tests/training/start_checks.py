"""Checks of a stage's start: rank 0 reads, the others get their weights from it; `test_engine` runs them on 2 ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from own_memory import most_memory
from stage_helpers import config_for, put_under_engine
from tiny_models import tiny_language_model
from tiny_run import TinyRun

from hive_ds.config import Recipe
from hive_ds.model.loading import generating_part
from hive_ds.recipe import load_recipe
from hive_ds.stages import Stage, stage_by_number
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint import save_model
from hive_ds.training.distributed import all_values, barrier, from_main
from hive_ds.training.ds_config import read_policy
from hive_ds.training.run_folder import StageFolder
from hive_ds.training.start_model import start_model

MIB = 2**20


def begin(ranks: Any, recipe: Recipe, run: Path, number: int) -> tuple[Any, Any, StageFolder, Attempt]:
    """The model as the stage starts, its processor, and the stage's folder."""
    folder = StageFolder(run, stage_by_number(number, recipe.model.kind))
    attempt = Attempt(folder.path, ranks.world)
    attempt.make_folder()
    attempt.sign()
    return *start_model(recipe, folder, ranks.world, lambda _: None), folder, attempt


def described(model: Any) -> dict[str, Any]:
    """All of a model but the values of its weights."""
    return {
        "weights": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        "state": sorted(model.state_dict()),
        "buffers": {name: (str(buffer.dtype), buffer.tolist()) for name, buffer in model.named_buffers()},
        "config": model.config.to_dict(),
        "generation": generating_part(model).generation_config.to_dict(),
        "modules": [str(module) for module in model.modules()],
    }


def start_and_finish(ranks: Any, recipe: Recipe, run: Path, stage: Stage, zero: int) -> None:
    """Start a stage, look at all ranks, and leave its folder as training does."""
    model, processor, folder, attempt = begin(ranks, recipe, run, stage.number)
    here, *others = all_values(described(model))
    assert all(other == here for other in others), stage
    assert here["generation"]["eos_token_id"] == [2, 7], (run, stage.number)
    read = from_main({name: value.clone() for name, value in model.state_dict().items()})
    trainee = put_under_engine(ranks, model, stage, zero=zero, config=config_for(1))
    if zero < 3:  # every rank has all of them
        own = trainee.engine.model.named_parameters()
        other = [name for name, weight in own if not torch.equal(weight.cpu(), read[name].cpu())]
        assert all_values(other) == [[]] * ranks.world.size, stage
    state = trainee.engine.gather_state()
    for name, value in state.items():
        assert torch.equal(value, read[name].cpu()), (stage, name)
    assert not ranks.world.is_main or state.keys() == read.keys()
    save_model(folder.model, trainee.engine, processor, ranks.world, attempt)
    folder.done.touch()
    barrier()
    trainee.engine.close()


def check_all_ranks_start_with_the_model_of_rank_0(ranks: Any) -> None:
    """Of HIVE and of the baseline, fresh and of an earlier stage, in ZeRO 2 and 3; answers end by the same tokens."""
    root = ranks.folder / "start"
    if ranks.world.is_main:
        TinyRun.make(root)
        model = tiny_language_model(vocab_size=128256)
        model.generation_config.eos_token_id = [2, 7]
        model.generation_config.save_pretrained(root / "language_model")
    barrier()
    sa = ("model.kind=cascaded", "model.routes=null")
    for run, overrides, stages in (("hive", (), (1, 2, 3, 4)), ("sa", sa, (1, 2))):
        recipe = load_recipe(root / "recipe.yaml", overrides)
        for number in stages:
            stage = stage_by_number(number, recipe.model.kind)
            start_and_finish(ranks, recipe, root / run, stage, zero=2 + number % 2)


def check_no_rank_but_0_holds_the_whole_model(ranks: Any) -> None:
    """Nor does a GPU: from reading to the engine of ZeRO-3, each holds its part and a parameter or two."""
    root = ranks.folder / "large"
    if ranks.world.is_main:
        tiny = TinyRun.make(root)
        wide = {"intermediate_size": 1 << 18, "num_hidden_layers": 4, "vocab_size": 300}  # 48 MiB and more a weight
        model = tiny_language_model(**wide).bfloat16()
        model.save_pretrained(tiny.root / "language_model")
    barrier()
    recipe = load_recipe(root / "recipe.yaml")
    policy = read_policy("zero3")
    policy["zero_optimization"]["reduce_bucket_size"] = 50_000  # by default as large as ten such models
    path = ranks.folder / f"small-bucket.{ranks.world.rank}.json"
    path.write_text(json.dumps(policy))
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with most_memory() as most:
        model, _, _, _ = begin(ranks, recipe, root / "run", 1)
        whole, reading = sum(p.numel() for p in model.parameters()) * 4 / MIB, most[0]
        trainee = put_under_engine(ranks, model, stage_by_number(1), zero=str(path), config=config_for(1))
    trainee.engine.close()
    found = {"whole": whole, "reading": reading, "all": most[0]}
    assert whole > 200, found
    if ranks.device.type == "cuda":
        on_gpu = (torch.cuda.max_memory_allocated() - before) / MIB
        assert 0.4 * whole < on_gpu < 0.7 * whole, (on_gpu, found)
    elif ranks.world.is_main:
        assert reading > 0.9 * whole, found
    else:
        assert reading < 0.1 * whole, found
        assert most[0] < 0.7 * whole, found
