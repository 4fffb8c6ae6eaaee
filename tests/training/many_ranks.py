"""One rank of many under torch's fake process group: DeepSpeed plans for all of them, nothing is sent.

``main([RANKS, PER_NODE, POLICY, ...])`` prints a JSON object. Weights that other ranks hold come back as
whatever lay in memory, so losses mean nothing; sizes, memory and messages are those of a run of so many ranks.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from communication_cases import LARGE_MODEL
from message_counter import MessageCounter, tally
from stage_helpers import CONFIG, draw_sample, make_trainee, pack, run_step
from torch.testing._internal.distributed.fake_pg import FakeStore

from hive_ds.training.distributed import World
from hive_ds.training.ds_config import read_policy

MICRO_BATCHES = 2
COUNTED = 3


def main(arguments: list[str]) -> int:
    """Partition sizes, optimizer elements and messages of one step, by policy."""
    (num_ranks, per_node), policies = map(int, arguments[:2]), arguments[2:]
    world = World(0, 0, num_ranks, per_node)
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", num_ranks), ("LOCAL_WORLD_SIZE", per_node)):
        os.environ[name] = str(value)
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    with TemporaryDirectory() as folder:
        ranks = SimpleNamespace(world=world, device=torch.device("cpu"), folder=Path(folder))
        print(json.dumps({policy: _count(ranks, policy) for policy in policies}))
    return 0


def policy_file(folder: Path, policy: str, per_node: int) -> str:
    """``policy`` with the limits of a large model to the tiny one, hpZ's nodes spelled out."""
    values = read_policy(policy)
    values["zero_optimization"] |= LARGE_MODEL
    if "zero_hpz_partition_size" in values["zero_optimization"]:
        values["zero_optimization"]["zero_hpz_partition_size"] = per_node
    path = folder / f"{policy}.json"
    path.write_text(json.dumps(values))
    return str(path)


def _count(ranks: Any, policy: str) -> dict[str, Any]:
    config = replace(CONFIG, global_batch_size=MICRO_BATCHES * ranks.world.size, micro_batch_size=1)
    zero = policy_file(ranks.folder, policy, ranks.world.local_size)
    trainee = make_trainee(ranks, stage=3, zero=zero, config=config)
    batches = [pack([draw_sample(index)]) for index in range(MICRO_BATCHES)]
    for _ in range(COUNTED):
        with MessageCounter() as counter:
            run_step(ranks, trainee, batches)
    optimizer = trainee.engine._optimizer
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
    found = {
        "sizes": trainee.engine.partition_sizes(),
        "optimizer_elements": sum(part.numel() for part in masters),
        "tally": tally(message for message in counter.messages if message.bytes > 64),  # without the scalars
    }
    trainee.engine.close()
    return found
