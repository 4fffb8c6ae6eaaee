"""A run that goes on with other numbers of ranks, and other ZeRO stages, computes what plain PyTorch does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from elastic_checks import CHAINS
from ranks import launch_checks, passed
from test_engine import reference  # noqa: F401 (a fixture)


@pytest.mark.parametrize("ranks", [(2, 1, 2), pytest.param((2, 1, 2, 4), marks=pytest.mark.long)])
def test_ranks_change_in_mid_run(
    ranks: tuple[int, ...],
    reference: list[list[float]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ELASTIC_FOLDER", str(tmp_path / "run"))
    rows: dict[str, list[list[float]]] = {chain: [] for chain in CHAINS}
    for leg, count in enumerate(ranks):
        monkeypatch.setenv("ELASTIC_LEG", str(leg))
        verdicts = launch_checks(["elastic_checks.check_leg"], count, tmp_path / f"leg{leg}")
        for chain, found in passed(verdicts["elastic_checks.check_leg"]).items():
            rows[chain] += found
    for found in rows.values():
        expected = torch.tensor(reference[: len(found)])
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)
