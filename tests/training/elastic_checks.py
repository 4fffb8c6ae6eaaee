"""One leg of a run that changes its number of ranks: resume, two steps, save; `test_elastic` strings legs together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from checkpoint_checks import identity_of, save, signed
from engine_checks import IMAGES
from stage_helpers import GLOBAL_BATCH, config_for, make_model, make_trainee, run_step, scrambled, step_batches
from zero_checks import hpz_policy

from hive_ds.config import TrainingConfig
from hive_ds.stages import stage_by_number
from hive_ds.training.checkpoint import load_checkpoint, newest_checkpoint, read_state
from hive_ds.training.checkpoint_writer import CheckpointWriter

STEPS = 2
"""Steps of a leg."""
HPZ = "hpZ of 2"
CHAINS: dict[str, tuple[int | str, ...]] = {
    "zero3": (3, 3, 3, 3),
    "mixed": (3, 0, 2, 1),
    "offload": ("zero3_offload_optimizer", 3, "zero3_offload_param", HPZ),
    "hpz": (HPZ, 3, HPZ, "zero3_offload_optimizer"),
}
"""ZeRO stage or policy of each leg."""


def check_leg(ranks: Any) -> dict[str, list[list[float]]]:
    """Loss and gradient norms of this leg's steps, for each chain."""
    leg, folder = int(os.environ["ELASTIC_LEG"]), Path(os.environ["ELASTIC_FOLDER"])
    micro = GLOBAL_BATCH // ranks.world.size
    config, training, rows = config_for(micro), TrainingConfig(precision="fp32"), {}
    for chain, policies in CHAINS.items():
        stage = stage_by_number(3)
        model = make_model(stage) if leg == 0 else scrambled(make_model(stage), stage)
        zero = hpz_policy(ranks, 2) if policies[leg] == HPZ else policies[leg]
        trainee = make_trainee(ranks, stage=3, zero=zero, precision="fp32", config=config, model=model)
        identity = identity_of(trainee, config)
        place = folder / chain
        first = 0
        if leg:
            found = newest_checkpoint(place, ranks.world, print)
            state = read_state(found, trainee.engine, identity, origin={}, warn=print)
            load_checkpoint(found, state, trainee.engine, ranks.world)
            first = state["step"]
            assert first == STEPS * leg
        rows[chain] = []
        for step in range(first, first + STEPS):
            loss, report = run_step(ranks, trainee, step_batches(ranks, step, micro, IMAGES))
            rows[chain].append([loss, *report.grad_norms.values()])
        attempt = signed(ranks, place)
        writer = CheckpointWriter(place, trainee.engine, identity, {}, ranks.world, attempt, training)
        assert save(writer, first + STEPS) is None
        trainee.engine.close()
    return rows
