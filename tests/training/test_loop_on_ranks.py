"""What the loop does around a step, on 2 ranks: checkpoints, hand-over, maps, micro-batches, pace, bad samples.

Rows 2, 11, 15 and 23 of the pitfalls among them.
"""

from __future__ import annotations

import pytest
from ranks import Verdict, check_names, launch_checks, passed

FILES = ("checkpoint_checks", "save_checks", "maps_checks", "micro_batch_checks", "loop_checks", "pace_checks")
CHECKS = check_names(*FILES)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    return launch_checks(CHECKS, 2, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, pair: dict[str, Verdict]) -> None:
    passed(pair[name])
