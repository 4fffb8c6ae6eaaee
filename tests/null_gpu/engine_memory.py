"""Memory of a step of one rank, on the null GPU: ``python engine_memory.py RECIPE STAGE BATCH TEXT_LENGTH``.

Under DeepSpeed's engine, by the policy of the recipe, a file or a name. Prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from steps import leave_out_what_is_not_there

from hive_ds.cost.model import random_model
from hive_ds.cost.workload import Workload
from hive_ds.recipe import load_recipe
from hive_ds.training.distributed import World, start
from hive_ds.training.ds_config import build_ds_config, read_policy
from hive_ds.training.engine import Engine
from hive_ds.training.global_batch import fit_micro_batch


def main() -> None:
    """Most bytes that PyTorch hands out in a step of two micro-batches, weights and optimizer included."""
    leave_out_what_is_not_there()
    recipe, (stage, batch, text_length) = load_recipe(sys.argv[1]), map(int, sys.argv[2:])
    device = start(World())
    model, plan = random_model(recipe, stage, device)
    model.language_loss.backend = "plain"  # as in the forecast
    asked = replace(recipe.stages[plan.stage.name], micro_batch_size=batch, global_batch_size=2 * batch)
    config, policy = fit_micro_batch(asked, 1), read_policy(recipe.training.ds_config)
    folder = Path(tempfile.gettempdir())
    given = build_ds_config(policy, config, recipe.training, num_ranks=1, log_folder=folder, job="memory")
    engine = Engine(model, plan.groups, given, config, world=World(), device=device)
    inputs = Workload(batch, text_length).inputs(model, device)
    for _ in range(2):  # the first step makes Adam's moments
        torch.cuda.reset_peak_memory_stats()
        for last in (False, True):
            engine.backward(engine.forward(**inputs, num_items_in_batch=batch * text_length).loss, last=last)
        engine.step(1.0)
    print(json.dumps({"bytes": torch.cuda.max_memory_allocated()}), flush=True)


if __name__ == "__main__":
    main()
