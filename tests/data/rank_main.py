"""One rank of `test_data_ranks`: run loaders over a folder and write what each step saw.

`main` takes the paths PLAN and OUT, with RANK, WORLD_SIZE and the ranks of the machine set as a launcher does.
PLAN is a JSON list of runs: name, folder (or folders with weights), cache, micro, global_batch, workers, steps,
save_at, shuffle, balance, max_bad_share, and resume, the name of a run whose saved state to start from (an earlier
plan's included); or of validations: name, folder, micro, workers, and first, how many samples.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from tiny_data import make_image_processor, make_tokenizer

from hive_ds.config import DataConfig
from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.environment import find_world
from hive_ds.data.loader import build_loader


def run(plan: dict, states: Path) -> dict:
    data = DataConfig(
        train=plan["folder"],
        cache=plan.get("cache"),
        shuffle=plan.get("shuffle", True),
        balance=plan.get("balance", False),
        num_workers=plan["workers"],
        max_bad_share=plan.get("max_bad_share", 0.0),
    )
    loader = build_loader(
        data,
        make_tokenizer("llama3"),
        make_image_processor(),
        micro_batch_size=plan["micro"],
        global_batch_size=plan["global_batch"],
        seed=7,
        train=True,
    )
    if "resume" in plan:
        loader.load_state_dict(json.loads((states / f"{plan['resume']}.json").read_text()))
    accumulation = plan["global_batch"] // plan["micro"] // int(os.environ.get("WORLD_SIZE", "1"))
    steps, bad = [], []
    batches = iter(loader)
    for step in range(plan["steps"]):
        step_batches = [next(batches) for _ in range(accumulation)]
        steps.append([name for batch in step_batches for name in batch.sample_ids])
        bad += [asdict(item) for batch in step_batches for item in batch.bad]
        if step + 1 == plan.get("save_at"):
            state = loader.state_dict()
            if os.environ.get("RANK", "0") == "0":
                (states / f"{plan['name']}.json").write_text(json.dumps(state))
    return {"steps": steps, "bad": bad, "length": len(loader), "state": loader.state_dict()}


def hold_out(plan: dict) -> dict:
    """Ids of the samples that carry loss in each batch of the first so many, and how many labels do."""
    data = DataConfig(train="", validation=plan["folder"], num_workers=plan["workers"])
    loader = build_loader(
        data,
        make_tokenizer("llama3"),
        make_image_processor(),
        micro_batch_size=plan["micro"],
        global_batch_size=plan["micro"] * find_world().size,
        seed=7,
        train=False,
    )
    batches = list(loader.first(plan["first"]))
    ids, labels = [], []
    for batch in batches:
        for name, own in zip(batch.sample_ids, batch.labels.split(batch.text_lengths), strict=True):
            if (own != IGNORE_INDEX).any():
                ids.append(name)
                labels.append(own.tolist())
    bad = [item.id for batch in batches for item in batch.bad]
    return {"batches": len(batches), "ids": ids, "labels": labels, "bad": bad}


def main(arguments: list[str]) -> int:
    plan, out = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{out.parent}/store{size}", rank=rank, world_size=size)
    results = {}
    for item in plan:
        results[item["name"]] = hold_out(item) if "first" in item else run(item, out.parent)
        if size > 1:
            dist.barrier()
    out.with_suffix(f".{rank}").write_text(json.dumps(results))
    if size > 1:
        dist.destroy_process_group()
    return 0
