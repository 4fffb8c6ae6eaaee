"""The job scripts around a trainer of no weight: what they ask Slurm for, and how each way to end goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from minicluster import MiniCluster, wait_for
from site_clone import SlurmSite
from stand_in import stand_in_package

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def gpu_site(site_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmSite]:
    """Two nodes of eight GPUs, and the stand-in for the trainer."""
    folder = tmp_path_factory.mktemp("gpus")
    cluster = MiniCluster.up(folder / "cluster", 2, gpus=8, shared=SlurmSite.shared_folders(site_folder))
    yield SlurmSite.make(site_folder, cluster, trainer=stand_in_package(site_folder / "gpu-site"))
    cluster.down()


def test_gpus_nodes_and_ranks_come_from_slurm(gpu_site: SlurmSite, site_folder: Path) -> None:
    gpu_site.edit("export HIVE_STAND_IN=0")
    run = site_folder / "gpus, 50%N"  # Slurm fills in %N in names of files
    override = ("--set", "data.train=a b")
    job = gpu_site.submit(1, run, *override, recipe="tiny", options=("--nodes=2",))
    assert gpu_site.wait(job) == "COMPLETED", gpu_site.log(job)
    logs = run / "stage1" / "attempts" / f"{job}.0"
    assert sorted(one.name for one in logs.glob("**/node?.log")) == ["node1.log", "node1.log", "node2.log", "node2.log"]
    places = [json.loads(path.read_text()) for path in logs.glob("rank-*.json")]
    assert sorted((int(place["RANK"]), place["host"]) for place in places) == [
        (rank, f"node{1 + rank // 8}") for rank in range(16)
    ]
    for place in places:
        assert (place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"], place["MASTER_ADDR"]) == ("16", "8", "node1")
        assert place["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
        assert place["arguments"][-2:] == list(override)
    job = gpu_site.submit(1, run, recipe="tiny")
    assert gpu_site.wait(job) == "COMPLETED"
    assert "is done already" in gpu_site.log(job)


def test_every_way_to_end(gpu_site: SlurmSite, site_folder: Path) -> None:
    gpu_site.edit("export HIVE_STAND_IN=20")
    run = site_folder / "stopped"
    job = gpu_site.submit(1, run, recipe="tiny")
    wait_for((run / "stage1" / "worked-0").exists, 60, f"its work; {gpu_site.log(job)}")
    gpu_site.login("scancel", "--batch", "--signal=USR1", str(job))
    wait_for(lambda: "time is up: requeueing" in gpu_site.log(job), 60, f"requeue; {gpu_site.log(job)}")
    wait_for(lambda: gpu_site.start_again(job) or gpu_site.field(job, "Restarts") == "1", 60, "the requeued job")
    second = run / "stage1" / "attempts" / f"{job}.1"
    wait_for(lambda: gpu_site.start_again(job) or (second / "rank-0.json").exists(), 60, "the second attempt")
    (run / "stage1" / "STOP").touch()  # by hand, in the second attempt
    assert gpu_site.wait(job) == "FAILED", gpu_site.log(job)
    assert gpu_site.field(job, "ExitCode") == "85:0"
    assert "submit the job again" in gpu_site.log(job)

    gpu_site.edit("export HIVE_STAND_IN='exit 2'")
    wrong = gpu_site.submit(1, site_folder / "wrong", recipe="tiny")
    assert gpu_site.wait(wrong) == "FAILED", gpu_site.log(wrong)
    assert (gpu_site.field(wrong, "ExitCode"), gpu_site.field(wrong, "Restarts")) == ("2:0", "0")

    gpu_site.edit("export HIVE_STAND_IN='exit 87' HIVE_MAX_FAILURES=2")
    failing = gpu_site.submit(1, site_folder / "failing", recipe="tiny")
    assert gpu_site.wait(failing) == "FAILED", gpu_site.log(failing)
    assert (gpu_site.field(failing, "ExitCode"), gpu_site.field(failing, "Restarts")) == ("1:0", "1")
    assert "failed 2 times without a new checkpoint: giving up" in gpu_site.log(failing)

    gpu_site.edit("export HIVE_STAND_IN='stuck 87' HIVE_MAX_FAILURES=2 HIVE_MAX_RESTARTS=3")
    stuck = gpu_site.submit(1, site_folder / "stuck", recipe="tiny")
    assert gpu_site.wait(stuck) == "FAILED", gpu_site.log(stuck)
    assert (gpu_site.field(stuck, "ExitCode"), gpu_site.field(stuck, "Restarts")) == ("1:0", "2")
    assert "failed 2 times without a new checkpoint: giving up" in gpu_site.log(stuck)


def test_trainer_that_does_not_answer_is_ended(gpu_site: SlurmSite, site_folder: Path) -> None:
    gpu_site.edit("export HIVE_STAND_IN=hang HIVE_STOP_PATIENCE=1")
    run = site_folder / "deaf"
    job = gpu_site.submit(1, run, recipe="tiny", options=("--nodes=2",))
    logs = run / "stage1" / "attempts" / f"{job}.0"
    wait_for(lambda: len(list(logs.glob("rank-*.json"))) == 16, 60, f"all ranks; {gpu_site.log(job)}")
    gpu_site.login("scancel", "--batch", "--signal=USR1", str(job))
    wait_for(lambda: "time is up: requeueing" in gpu_site.log(job), 60, f"requeue; {gpu_site.log(job)}")
    assert "no answer: ending the trainer" in gpu_site.log(job)
    for node in ("node1", "node2"):  # Slurm ends the ranks of a step one by one
        wait_for(
            lambda node=node: "hive_ds.train" not in gpu_site.cluster.run("ps", "-eo", "args", node=node),
            30,
            f"the end of all ranks on {node}",
        )
    gpu_site.login("scancel", str(job))


def test_wrong_arguments_end_the_job_and_its_chain(gpu_site: SlurmSite, site_folder: Path) -> None:
    job = int(gpu_site.login("sbatch", "--parsable", "slurm/stage1.sh", "--recepi", "tiny"))
    assert gpu_site.wait(job) == "FAILED"
    assert "error: unknown argument --recepi; expected --recipe R" in gpu_site.log(job)
    gpu_site.edit("export HIVE_STAND_IN='exit 2'")
    run = site_folder / "chain, 50%j"
    submitted = gpu_site.login("slurm/pipeline.sh", "--recipe", "tiny", "--run", str(run)).splitlines()
    jobs = [int(line.split(": job ")[1].split(",")[0]) for line in submitted]
    assert [gpu_site.wait(one) for one in jobs] == ["FAILED", *["CANCELLED"] * 5]
    assert [one.name for one in (run / "logs").iterdir()] == [f"hive-stage1-{jobs[0]}.log"]


def test_chain_without_python_on_the_login_node(gpu_site: SlurmSite, site_folder: Path) -> None:
    gpu_site.edit("HIVE_PYTHON=/only/in/the/container HIVE_STAGES='1 2 4' HIVE_EVAL=(mme /data)")
    submitted = gpu_site.login("slurm/pipeline.sh", "--recipe", "tiny", "--run", str(site_folder / "contained"))
    names = [line.split(":")[0] for line in submitted.splitlines()]
    assert names == ["stage1", "stage2", "export", "stage4", "eval"]
