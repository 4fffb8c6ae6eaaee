"""Memory of a micro-batch on the null GPU: ``python memory.py RECIPE STAGE BATCH TEXT_LENGTH``; a line of JSON."""

from __future__ import annotations

import json
import sys

import torch
from steps import leave_out_what_is_not_there

from hive_ds.cost.model import random_model
from hive_ds.cost.workload import Workload
from hive_ds.recipe import load_recipe


def main() -> None:
    """Most bytes that PyTorch hands out in forward and backward, beside weights and inputs, gradients included."""
    leave_out_what_is_not_there()
    recipe, stage, batch, text_length = sys.argv[1], *map(int, sys.argv[2:])
    device = torch.device("cuda")
    model, _ = random_model(load_recipe(recipe), stage, device)
    model.language_loss.backend = "plain"  # as in the forecast
    inputs = Workload(batch, text_length).inputs(model, device)
    found = 0
    for _ in range(2):  # the first time libraries take their work space
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(**inputs).loss.backward()
        found = torch.cuda.max_memory_allocated() - before
    print(json.dumps({"bytes": found}), flush=True)


if __name__ == "__main__":
    main()
