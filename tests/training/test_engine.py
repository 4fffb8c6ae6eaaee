"""The engine on 1 and 2 ranks: equal losses, and rows 1, 3, 13 to 15, 19, 25, 26 of the pitfalls."""

from __future__ import annotations

from pathlib import Path

import cascaded_checks
import pytest
import torch
from engine_checks import BF16_STEPS, IMAGES, STEPS
from ranks import Verdict, check_names, launch_checks, passed
from stage_helpers import in_plain_pytorch, make_cascaded, make_model

from hive_ds.stages import stage_by_number

CHECKS = check_names("engine_checks", "zero_checks", "cascaded_checks", "loss_checks", "start_checks")
LOSSES, BF16, GENERATION = (f"engine_checks.check_{name}" for name in ("losses", "bf16", "generation"))
CASCADED, CASCADED_GENERATION = (f"cascaded_checks.check_cascaded_{name}" for name in ("losses", "generation"))
PROFILES, PROFILES_BF16 = (f"zero_checks.check_profile_{name}" for name in ("losses", "bf16"))
VALUES = (LOSSES, BF16, GENERATION, PROFILES, PROFILES_BF16, CASCADED, CASCADED_GENERATION)
"""Checks whose results are compared."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    return launch_checks([LOSSES, GENERATION, CASCADED, CASCADED_GENERATION], 1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    return launch_checks(CHECKS, 2, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def reference() -> list[list[float]]:
    """Loss and gradient norms of the same steps in plain PyTorch."""
    stage = stage_by_number(3)
    return in_plain_pytorch(make_model(stage), stage, STEPS, IMAGES)


@pytest.mark.parametrize(
    ("ranks", "zero"),
    [(f"1x{micro}", zero) for micro in (4, 1) for zero in (0, 3)]
    + [(f"2x{micro}", zero) for micro in (2, 1) for zero in (0, 1, 2, 3, "3 whole")],
)
def test_every_split_and_zero_stage_trains_as_plain_pytorch(
    ranks: str, zero: int | str, alone: dict[str, Verdict], pair: dict[str, Verdict], reference: list[list[float]]
) -> None:
    losses = passed((alone if ranks.startswith("1") else pair)[LOSSES])
    torch.testing.assert_close(
        torch.tensor(losses[f"{ranks} zero{zero}"]), torch.tensor(reference), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3, "3 whole"])
def test_bf16_follows_fp32(zero: int | str, pair: dict[str, Verdict], reference: list[list[float]]) -> None:
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
    """Those of a model in one piece, whose linear layers are PyTorch's: DeepSpeed's round once more in bf16."""
    found = torch.tensor(passed(pair[PROFILES_BF16])[profile])
    wanted = torch.tensor(passed(pair[BF16])["zero3 whole"])
    torch.testing.assert_close(found, wanted[: len(found)], rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_hpz_on_two_nodes_of_two_ranks(tmp_path: Path, reference: list[list[float]]) -> None:
    name = "zero_checks.hpz_on_nodes"
    losses = passed(launch_checks([name], 4, tmp_path)[name])
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", cascaded_checks.CASES)
def test_cascaded_stages_train_as_plain_pytorch(case: str, alone: dict[str, Verdict], pair: dict[str, Verdict]) -> None:
    stage = stage_by_number(int(case[len("stage")]), "cascaded")
    expected = in_plain_pytorch(make_cascaded(), stage, cascaded_checks.STEPS, cascaded_checks.IMAGES)
    for verdicts in (alone, pair):
        found = torch.tensor(passed(verdicts[CASCADED])[case])
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [GENERATION, CASCADED_GENERATION])
def test_generation_under_zero3_equals_one_process(
    name: str, alone: dict[str, Verdict], pair: dict[str, Verdict]
) -> None:
    assert passed(pair[name]) == passed(alone[name])


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in VALUES])
def test_on_two_ranks(name: str, pair: dict[str, Verdict]) -> None:
    passed(pair[name])
