"""Communication of real runs against what planning predicts, message by message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from communication_cases import CASES, QUICK, SCALED, Case, predicted
from ranks import launch_checks, passed

ALL, SOME = (f"communication_checks.check_{name}" for name in ("communication", "quick"))
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "communication.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("communication")


@pytest.fixture(scope="module")
def pair(folder: Path) -> dict[str, Any]:
    return passed(launch_checks([SOME], 2, folder)[SOME])


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_two_ranks_send_what_was_predicted(case: Case, pair: dict[str, Any], folder: Path) -> None:
    assert pair[case.name]["tally"] == predicted(case, folder / "tiny", 2)


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_send_what_was_predicted(num_ranks: int, tmp_path: Path) -> None:
    counted = passed(launch_checks([ALL], num_ranks, tmp_path)[ALL])
    expected = {case.name: predicted(case, tmp_path / "tiny", num_ranks) for case in CASES}
    assert {name: row["tally"] for name, row in counted.items()} == expected
    losses = [counted[case.name]["loss"] for case in CASES if case.stage == 3 and case.precision == "fp32"]
    assert max(losses) - min(losses) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stored_results_are_what_is_predicted_now(case: Case, folder: Path, pair: dict[str, Any]) -> None:
    for ranks, row in json.loads(RESULTS.read_text())["cases"][case.name].items():
        assert row["measured"]["tally"] == row["predicted"] == predicted(case, folder / "tiny", int(ranks))


def test_every_number_of_ranks_has_the_same_losses() -> None:
    cases = json.loads(RESULTS.read_text())["cases"]
    scaled = [cases[case.name] for case in SCALED]
    assert {tuple(sorted(row, key=int)) for row in scaled} == {("1", "2", "4", "8")}
    losses = [row[ranks]["measured"]["loss"] for row in scaled for ranks in row]
    assert max(losses) - min(losses) < 1e-5
