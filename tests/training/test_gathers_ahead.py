"""Under ZeRO-3, weights are gathered before the module that needs them asks, as far as the prefetch bucket goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ahead_checks import BUCKETS
from ranks import launch_checks, passed


@pytest.mark.long
def test_weights_come_before_they_are_needed(tmp_path: Path) -> None:
    name = "ahead_checks.check_ahead"
    found = passed(launch_checks([name], 2, tmp_path)[name])
    for case, elements in found.items():
        share = elements["ahead"] / sum(elements.values())
        print(f"{case}: {elements}, {share:.1%} ahead")
        bucket = int(case.split()[1])
        if bucket == 0:
            assert share == 0, case
        elif bucket == BUCKETS[-1]:
            assert share > 0.99, case
        else:
            assert 0.5 < share < 0.9, case


@pytest.mark.long
def test_gathers_asked_for_early_are_not_waited_for(tmp_path: Path) -> None:
    name = "ahead_checks.check_waits"
    found = passed(launch_checks([name], 2, tmp_path)[name])
    hidden = []
    for case, times in found.items():
        hidden.append(1 - times["waited"] / times["on the link"])
        print(f"{case}: {times}, {hidden[-1]:.0%} hidden")
    assert hidden[0] < 0.1 < 0.6 < hidden[-1]
