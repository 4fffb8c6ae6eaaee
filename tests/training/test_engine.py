"""The engine on 1 and 2 ranks: equal losses, and rows 1 to 3, 13 to 15, 19, 23, 25, 26 of the pitfalls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_checks import BF16_STEPS, IMAGES, STEPS
from ranks import Verdict, check_names, launch_checks, passed
from stage_helpers import CONFIG, make_model, step_batches

from hive_ds.stages import hive_groups, stage_by_number
from hive_ds.training.groups import plan_stage

CHECKS = check_names("engine_checks", "checkpoint_checks", "save_checks", "zero_checks", "pace_checks")
LOSSES, BF16, GENERATION = (f"engine_checks.check_{name}" for name in ("losses", "bf16", "generation"))
PROFILES, PROFILES_BF16 = (f"zero_checks.check_profile_{name}" for name in ("losses", "bf16"))
VALUES = (LOSSES, BF16, GENERATION, PROFILES, PROFILES_BF16)
"""Checks whose results are compared."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    return launch_checks([LOSSES, GENERATION], 1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    return launch_checks(CHECKS, 2, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def reference() -> list[list[float]]:
    """Loss and gradient norms of the same steps in plain PyTorch: one batch of four samples, one mean over tokens."""
    model, stage = make_model(stage_by_number(3)), stage_by_number(3)
    plan = plan_stage(model, stage, hive_groups(model.routes.blocks_by_layer, model.last_vision_block), CONFIG)
    optimizer = torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "weight_decay": group.weight_decay} for group in plan.groups],
        lr=CONFIG.lr,
        betas=CONFIG.betas,
        eps=CONFIG.eps,
    )
    rows = []
    for step in range(STEPS):
        (batch,) = step_batches(SimpleNamespace(world=SimpleNamespace(rank=0, size=1)), step, 4, IMAGES)
        loss = model(**batch.model_inputs("cpu", torch.float32)).loss
        loss.backward()
        norms = {group.module_group: 0.0 for group in plan.groups}
        for group in plan.groups:
            norms[group.module_group] += sum(float(p.grad.norm() ** 2) for p in group.parameters.values())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([loss.item(), *(square**0.5 for square in norms.values())])
    return rows


@pytest.mark.parametrize(
    ("ranks", "zero"),
    [(f"1x{micro}", zero) for micro in (4, 1) for zero in (0, 3)]
    + [(f"2x{micro}", zero) for micro in (2, 1) for zero in (0, 1, 2, 3)],
)
def test_every_split_and_zero_stage_trains_as_plain_pytorch(
    ranks: str, zero: int, alone: dict[str, Verdict], pair: dict[str, Verdict], reference: list[list[float]]
) -> None:
    losses = passed((alone if ranks.startswith("1") else pair)[LOSSES])
    torch.testing.assert_close(
        torch.tensor(losses[f"{ranks} zero{zero}"]), torch.tensor(reference), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_follows_fp32(zero: int, pair: dict[str, Verdict], reference: list[list[float]]) -> None:
    losses = torch.tensor(passed(pair[BF16])[f"zero{zero}"])
    torch.testing.assert_close(losses, torch.tensor(reference[:BF16_STEPS]), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    "profile", ["2x2 zero3_offload_optimizer", "2x1 zero3_offload_param", "2x1 hpz of 2", "2x2 zero3_hpz"]
)
def test_profile_trains_as_zero3(profile: str, pair: dict[str, Verdict]) -> None:
    found = torch.tensor(passed(pair[PROFILES])[profile])
    wanted = torch.tensor(passed(pair[LOSSES])[f"{profile.split()[0]} zero3"])
    torch.testing.assert_close(found, wanted[: len(found)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("profile", ["zero3_offload_param", "hpz of 2"])
def test_profile_trains_as_zero3_in_bf16(profile: str, pair: dict[str, Verdict]) -> None:
    found = torch.tensor(passed(pair[PROFILES_BF16])[profile])
    wanted = torch.tensor(passed(pair[BF16])["zero3"])
    torch.testing.assert_close(found, wanted[: len(found)], rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_hpz_on_two_nodes_of_two_ranks(tmp_path: Path, reference: list[list[float]]) -> None:
    name = "zero_checks.hpz_on_nodes"
    losses = passed(launch_checks([name], 4, tmp_path)[name])
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(reference), rtol=1e-5, atol=1e-5)


def test_generation_under_zero3_equals_one_process(alone: dict[str, Verdict], pair: dict[str, Verdict]) -> None:
    assert passed(pair[GENERATION]) == passed(alone[GENERATION])


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in VALUES])
def test_on_two_ranks(name: str, pair: dict[str, Verdict]) -> None:
    passed(pair[name])
