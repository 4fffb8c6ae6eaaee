"""slurm/eval.sh under real Slurm: ranks of one node score a model; again, it is done already."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from minicluster import MiniCluster
from site_clone import SlurmSite

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))

from benchmark_data import write_benchmarks
from scene_models import save_scene_model

pytestmark = [pytest.mark.cluster, pytest.mark.long]
CONTAINED = f'#!/bin/sh\n[ -z "$INSIDE" ] || exit 127\nINSIDE=1 exec {sys.executable} "$@"\n'
"""A Python as of apptainer: a script around a container, which cannot be started inside of that."""


def test_eval_job(site_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; make venv installs it")
    run = site_folder / "evaluated"
    stage = run / "stage3"
    stage.mkdir(parents=True)
    save_scene_model(stage / "model")
    (stage / "DONE").touch()
    data = write_benchmarks(site_folder / "benchmarks")
    cluster = MiniCluster.up(tmp_path / "cluster", 1, shared=SlurmSite.shared_folders(site_folder))
    try:
        site = SlurmSite.make(site_folder, cluster, ranks=2)
        job = int(site.login("sbatch", "--parsable", "slurm/eval.sh", str(run)))
        assert site.wait(job) == "FAILED"
        assert "eval.sh needs HIVE_EVAL in env.sh" in site.log(job)
        site.edit(f"HIVE_EVAL=(gqa,scienceqa {data} --batch-size 4)")
        (site.clone / "python").write_text(CONTAINED)
        (site.clone / "python").chmod(0o755)
        site.edit(f"export HIVE_PYTHON={site.clone}/python LMMS_EVAL_DATASETS_CACHE={site_folder}/cache")
        job = int(site.login("sbatch", "--parsable", "slurm/eval.sh", str(run)))
        assert site.wait(job) == "COMPLETED", site.log(job)
        results = json.loads((run / "eval/results.json").read_text())
        assert (results["ranks"], list(results["benchmarks"])) == (2, ["gqa", "scienceqa"])
        assert "| scienceqa " in site.log(job)
        job = int(site.login("sbatch", "--parsable", "slurm/eval.sh", str(run)))
        assert site.wait(job) == "COMPLETED"
        assert "is there already" in site.log(job)
    finally:
        cluster.down()
