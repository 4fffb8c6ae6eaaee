"""Stages under real Slurm: to the end, chained, and through what clusters do to them."""

from __future__ import annotations

from pathlib import Path

import pytest
from site_clone import SlurmSite, same_weights, training_lines
from tiny_run import STEPS, TinyRun

pytestmark = pytest.mark.cluster


def test_two_nodes_to_the_end(site: SlurmSite, tiny: TinyRun, tmp_path: Path) -> None:
    run = tiny.root / "two-nodes"
    job = site.submit(1, run, recipe=tiny.root / "recipe.yaml", options=("--nodes=2",))
    assert site.wait(job) == "COMPLETED", site.log(job)
    assert (run / "stage1" / "DONE").exists()
    assert len(training_lines(run)) == STEPS
    print(site.log(job))
