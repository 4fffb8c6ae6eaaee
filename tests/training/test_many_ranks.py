"""DeepSpeed's own plan for 64 to 1,024 ranks, made by one of them, against what planning predicts."""

from __future__ import annotations

import json
import os
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from many_ranks import MICRO_BATCHES, policy_file
from message_counter import tally
from stage_helpers import CONFIG, draw_sample, make_model, pack

from hive_ds.planning.communication import ParameterLayout, ZeroPolicy, step_messages
from hive_ds.planning.trace import recorded
from hive_ds.stages import stage_by_number
from hive_ds.training.ds_config import read_policy
from hive_ds.training.groups import groups_of, plan_stage

PER_NODE = 8
PROFILES = ("zero1", "zero2", "zero3", "zero3_hpz")


def _dry_run(num_ranks: int, *policies: str) -> dict[str, Any]:
    arguments = [str(num_ranks), str(PER_NODE), *policies]
    done = run_forked("many_ranks:main", arguments, os.environ, 1, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _check(num_ranks: int, policy: str, found: dict[str, Any], folder: Path) -> None:
    """Partitions and optimizer state are a rank's share, padded; messages are those predicted."""
    stage = stage_by_number(3)
    model = make_model(stage)
    plan = plan_stage(model, stage, groups_of(model), CONFIG)
    layout = ParameterLayout.of(model, plan)
    batch = pack([draw_sample(0)])
    with recorded(model) as trace:
        model(**batch.model_inputs("cpu", next(model.parameters()).dtype)).loss.backward()
    zero = ZeroPolicy.of(read_policy(policy_file(folder, policy, PER_NODE)), num_ranks, PER_NODE)
    messages = step_messages(layout, trace, zero, num_ranks=num_ranks, micro_batches=MICRO_BATCHES, weight_bytes=4)
    assert found["tally"] == tally([*messages.gathers, *messages.renewals, *messages.gradients])
    whole = {name: layout.sizes[name] for name in layout.sizes}
    shares = {name: ceil(size / num_ranks) for name, size in whole.items()}
    assert found["sizes"] == (shares if zero.stage == 3 else whole)
    if zero.stage == 3:
        assert found["optimizer_elements"] == sum(shares[name] for name in layout.trained)
    else:
        unit = 2 * num_ranks
        groups = [sum(layout.sizes[name] for name in group) for group in layout.groups]
        assert found["optimizer_elements"] == sum(ceil(size / unit) * 2 for size in groups)


def test_64_ranks(tmp_path: Path) -> None:
    found = _dry_run(64, "zero3")
    _check(64, "zero3", found["zero3"], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [64, 256, 1024])
def test_more_ranks_hold_less_and_send_as_predicted(num_ranks: int, tmp_path: Path) -> None:
    found = _dry_run(num_ranks, *PROFILES)
    for policy in PROFILES:
        _check(num_ranks, policy, found[policy], tmp_path)
