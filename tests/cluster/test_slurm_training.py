"""Stages under real Slurm: to the end, chained, and through what clusters do to them.

A run that something happened to must end with the weights of an undisturbed one, bit by bit.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from minicluster import MiniCluster, wait_for
from PIL import Image
from site_clone import SlurmSite, same_weights, training_lines
from tiny_run import STEPS, TinyRun

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, site_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 on two nodes, undisturbed."""
    run = tiny.root / "straight"
    cluster = MiniCluster.up(
        tmp_path_factory.mktemp("straight") / "cluster", 2, shared=SlurmSite.shared_folders(site_folder)
    )
    try:
        site = SlurmSite.make(site_folder, cluster)
        job = site.submit(1, run, recipe=tiny.root / "recipe.yaml", options=("--nodes=2",))
        assert site.wait(job) == "COMPLETED", site.log(job)
    finally:
        cluster.down()
    return run


def started(site: SlurmSite, tiny: TinyRun, name: str, nodes: int = 2) -> tuple[int, Path]:
    """A job in the middle of its steps, with a checkpoint; returns its number and its run folder."""
    run = tiny.root / name
    job = site.submit(1, run, recipe=tiny.root / "recipe.yaml", options=(f"--nodes={nodes}",))
    wait_for((run / "stage1" / "latest").exists, 240, f"a checkpoint; {site.log(job)}")
    assert not (run / "stage1" / "DONE").exists()
    return job, run


def ranks_on(cluster: MiniCluster, node: str) -> list[str]:
    """Process numbers of the trainer's ranks on a node, in its own namespace."""
    lines = cluster.run("ps", "-eo", "pid,args", node=node).splitlines()
    return [line.split()[0] for line in lines if " -m hive_ds.train " in line and "hive_ds.launch" not in line]


def test_two_nodes_to_the_end(straight: Path) -> None:
    assert len(training_lines(straight)) == STEPS
    logs = straight / "stage1" / "attempts" / "1.0"
    assert {path.name for path in logs.iterdir()} >= {
        *("arguments", "commit", "changes.diff", "environment", "packages", "recipe.yaml"),
        *("node1.log", "node2.log", "node1.code", "node2.code"),
    }
    assert "deepspeed==" in (logs / "packages").read_text()


def test_time_is_up(site: SlurmSite, tiny: TinyRun, straight: Path) -> None:
    job, run = started(site, tiny, "time-is-up")
    site.login("scancel", "--batch", "--signal=USR1", str(job))
    assert site.wait(job) == "COMPLETED", site.log(job)
    assert site.field(job, "Restarts") == "1"
    assert "time is up: requeueing" in site.log(job)
    assert "resumed from" in (run / "stage1" / "attempts" / f"{job}.1" / "node1.log").read_text()
    # No step was trained twice: the first attempt saved where it stopped.
    assert training_lines(run) == training_lines(straight)
    assert same_weights(run, straight)


def test_rank_killed(site: SlurmSite, tiny: TinyRun, straight: Path) -> None:
    job, run = started(site, tiny, "rank-killed")
    site.cluster.run("kill", "-9", ranks_on(site.cluster, "node2")[0], node="node2")
    killed = time.monotonic()
    wait_for(lambda: "failed: requeueing" in site.log(job), 60, f"the end of all ranks; {site.log(job)}", every=0.2)
    assert time.monotonic() - killed < 30
    assert site.wait(job) == "COMPLETED", site.log(job)
    assert "node2.code:137" in site.log(job)
    assert same_weights(run, straight)


def test_node_crash_with_a_spare(site: SlurmSite, tiny: TinyRun, straight: Path) -> None:
    job, run = started(site, tiny, "crash")
    site.cluster.crash("node1")  # with the job's script and rank 0 on it
    assert site.wait(job) == "COMPLETED", site.log(job)
    assert site.field(job, "NodeList") == "node[2-3]"
    assert same_weights(run, straight)


def test_lost_node_cannot_write(cluster: MiniCluster, site_folder: Path, tiny: TinyRun, straight: Path) -> None:
    """A node without network, whose disk still works, trains on while the job runs elsewhere."""
    site = SlurmSite.make(site_folder, cluster, ranks=2)
    job, run = started(site, tiny, "lost", nodes=1)
    ranks = ranks_on(cluster, "node1")
    assert len(ranks) == 2
    cluster.run("kill", "-STOP", *ranks, node="node1")  # else they would be through before Slurm notices
    cluster.cut("node1")
    signature = run / "stage1" / "attempt"

    def taken_over() -> bool:
        site.start_again(job)
        return signature.read_text() == f"{job}.1"

    wait_for(taken_over, 240, f"the second attempt; {site.log(job)}", every=0.5)
    cluster.run("kill", "-CONT", *ranks, node="node1")
    old_log = run / "stage1" / "attempts" / f"{job}.0" / "node1.log"
    refusal = f"attempt {job}.1 took over from this one, {job}.0; nothing was written"
    wait_for(lambda: refusal in old_log.read_text(), 120, f"the refusal; {old_log.read_text()}", every=0.5)
    assert site.wait(job) == "COMPLETED", site.log(job)
    cluster.heal("node1")
    assert signature.read_text() == f"{job}.1"
    assert same_weights(run, straight)


def test_chain_and_chain_again(site: SlurmSite, tiny: TinyRun) -> None:
    run, source = tiny.root / "chain", tiny.root / "source"
    source.mkdir()
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    Image.new("RGB", (8, 8), "red").save(source / "a.png")
    (source / "a.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    site.edit(f"HIVE_CONVERT=({source}/a.json {source}/mds --images {source} --workers 1)")
    command = ("slurm/pipeline.sh", "--recipe", f"{tiny.root}/recipe.yaml", "--run", str(run))
    submitted = site.login(*command).splitlines()
    jobs = [int(line.split(": job ")[1].split(",")[0]) for line in submitted]
    assert [line.split(":")[0] for line in submitted] == [
        *("convert", "stage1", "stage2", "stage3", "export", "stage4", "stage5")
    ]
    again = site.login(*command)
    assert again.count("is queued or running") == 7
    assert [site.wait(job, 400) for job in jobs] == ["COMPLETED"] * 7, submitted
    assert (source / "mds" / "index.json").exists()
    assert (run / "encoder" / "config.json").exists()
    assert (run / "stage5" / "DONE").exists()
    assert site.login(*command).count("done already") == 7
    assert "queued" not in site.login("squeue", "--noheader")
