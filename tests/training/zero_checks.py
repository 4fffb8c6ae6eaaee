"""Checks of the ZeRO-3 profiles beside plain ZeRO-3; `test_engine` runs them on 2 ranks, `test_hpz` on 4."""

from __future__ import annotations

import json
import os
from typing import Any

from engine_checks import BF16_STEPS, trained_losses
from stage_helpers import config_for, make_trainee, run_step, step_batches

from hive_ds.training.ds_config import read_policy

OFFLOADS = ("zero3_offload_optimizer", "zero3_offload_param")


def hpz_policy(ranks: Any, size: int | str) -> str:
    """Path of zero3_hpz with another partition size."""
    policy = read_policy("zero3_hpz")
    policy["zero_optimization"]["zero_hpz_partition_size"] = size
    path = ranks.folder / f"hpz-{size}.{ranks.world.rank}.json"
    path.write_text(json.dumps(policy))
    return str(path)


def profiles(ranks: Any) -> dict[str, str]:
    """Every profile; on a single node "auto" switches hpZ off, so it is tried with a size as well."""
    return {**{name: name for name in (*OFFLOADS, "zero3_hpz")}, "zero3_hpz of 2": hpz_policy(ranks, 2)}


def check_profile_losses(ranks: Any) -> dict[str, list[list[float]]]:
    """Loss and gradient norms of 20 steps of two micro-batches a rank."""
    return {name: trained_losses(ranks, 1, policy) for name, policy in profiles(ranks).items()}


def check_profile_bf16(ranks: Any) -> dict[str, list[list[float]]]:
    """The same in bf16, beside zero3's."""
    policies = {"zero3": "zero3", **profiles(ranks)}
    return {name: trained_losses(ranks, 2, policy, "bf16", BF16_STEPS) for name, policy in policies.items()}
