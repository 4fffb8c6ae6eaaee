"""Bad nodes are found before training, named and left out; real faults, and a trainer of no weight."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from minicluster import MiniCluster, wait_for
from site_clone import SlurmSite
from stand_in import stand_in_package

pytestmark = pytest.mark.cluster
NODES = 7
PYTHON = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
BROKEN_PYTHON = "#!/bin/sh\necho 'libpython: cannot open shared object file' >&2\nexit 127\n"


@pytest.fixture(scope="module")
def seven(site_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmSite]:
    """Nodes with a scratch disk and a Python of their own; Slurm takes its time to notice that one is gone."""
    folder = tmp_path_factory.mktemp("seven")
    shared = SlurmSite.shared_folders(site_folder)
    cluster = MiniCluster.up(folder / "cluster", NODES, patience=300, shared=shared)
    site = SlurmSite.make(site_folder, cluster, trainer=stand_in_package(site_folder / "preflight"))
    for number in range(1, NODES + 1):
        cluster.run("sh", "-c", "mkdir /run/scratch && mount -t tmpfs tmpfs /run/scratch", node=f"node{number}")
        install_python(cluster, f"node{number}", PYTHON)
    site.edit("HIVE_CPU_RANKS=1 HIVE_SCRATCH=/run/scratch HIVE_PYTHON=/run/python; export HIVE_STAND_IN=0")
    yield site
    cluster.down()


@pytest.fixture(autouse=True)
def mended(seven: SlurmSite) -> Iterator[None]:
    """What a test breaks is whole again after it."""
    yield
    for number in range(1, NODES + 1):
        seven.cluster.heal(f"node{number}")
        shrink_shared_memory(seven.cluster, f"node{number}", "2g")
        install_python(seven.cluster, f"node{number}", PYTHON)
        seven.cluster.run(
            "sh", "-c", "mount -o remount,rw /run/scratch; ip route flush type blackhole", node=f"node{number}"
        )


def install_python(cluster: MiniCluster, node: str, text: str) -> None:
    cluster.run("sh", "-c", 'printf "%s" "$0" >/run/python && chmod +x /run/python', text, node=node)


def shrink_shared_memory(cluster: MiniCluster, node: str, size: str = "64m") -> None:
    cluster.run("mount", "-o", f"remount,size={size}", "/dev/shm", node=node)


def faults(site: SlurmSite, job: int) -> dict[str, str]:
    """What the job's log says of each unfit node."""
    return dict(re.findall(r"^(node\d): (.*)$", site.log(job), re.MULTILINE))


def trained_on(run: Path, job: int, attempt: int = 0) -> set[str]:
    logs = run / "stage1" / "attempts" / f"{job}.{attempt}"
    return {path.stem for path in logs.glob("node*.code")}


def test_bad_nodes_are_named_and_left_out(seven: SlurmSite, site_folder: Path) -> None:
    cluster, run, go = seven.cluster, site_folder / "spares", site_folder / "go"
    cluster.run("mount", "-o", "remount,ro", "/run/scratch", node="node2")
    shrink_shared_memory(cluster, "node3")
    install_python(cluster, "node4", BROKEN_PYTHON)
    cluster.run("ip", "route", "add", "blackhole", "10.77.0.15", node="node7")  # no way to node5, but to all others
    seven.edit(f"while [ ! -e {go} ]; do sleep 0.1; done")
    job = seven.submit(1, run, "--spares", "5", recipe="tiny", options=(f"--nodes={NODES}",))
    wait_for(lambda: seven.state(job) == "RUNNING", 30, "the job")
    cluster.cut("node6")
    go.touch()
    wait_for((run / "stage1" / "DONE").exists, 120, f"the end of training; {run}")
    cluster.heal("node6")  # Slurm does not call a job over while a node of it is silent
    assert seven.wait(job) == "COMPLETED", seven.log(job)
    found = faults(seven, job)
    assert found["node2"] == "cannot write to /run/scratch: Read-only file system"
    assert found["node3"] == "/dev/shm has 0.07 GB; 1 ranks need 0.25 GB"
    assert found["node4"] == "did not finish its check: libpython: cannot open shared object file"
    assert found["node6"].startswith("did not finish its check: srun: error: Task launch for StepId=")
    assert found["node7"] == "network: node5 not reached, or does not reach it"
    assert set(found) == {"node2", "node3", "node4", "node6", "node7"}
    assert re.search(r"2 of 7 nodes are good, 2 needed, \d+ s all-reduce of 2 nodes: \d", seven.log(job))
    assert trained_on(run, job) == {"node1", "node5"}


def test_without_spares_the_job_goes_elsewhere(seven: SlurmSite, site_folder: Path) -> None:
    run = site_folder / "elsewhere"
    shrink_shared_memory(seven.cluster, "node1")
    job = seven.submit(1, run, recipe="tiny", options=("--exclude=node[2,5]",))
    assert seven.wait(job) == "COMPLETED", seven.log(job)
    assert "too few good nodes: requeueing the job, without node1" in seven.log(job)
    assert seven.field(job, "ExcNodeList") == "node[2,5],node1"
    assert seven.field(job, "Restarts") == "1"
    assert trained_on(run, job, attempt=1) == {"node3"}


def test_a_fault_of_all_nodes_ends_the_job(seven: SlurmSite, site_folder: Path) -> None:
    seven.edit("HIVE_SCRATCH=/nowhere")
    job = seven.submit(1, site_folder / "nowhere", recipe="tiny", options=("--nodes=2",))
    assert seven.wait(job) == "FAILED", seven.log(job)
    assert (seven.field(job, "ExitCode"), seven.field(job, "Restarts")) == ("2:0", "0")
    assert "error: no node is fit to train on" in seven.log(job)
    assert set(faults(seven, job).values()) == {"cannot write to /nowhere: No such file or directory"}


def test_what_srun_refuses_for_all_nodes_is_said(seven: SlurmSite, site_folder: Path) -> None:
    seven.edit("HIVE_SCRATCH=/run/scratch HIVE_SRUN=(--container-image=x)")  # where there is no pyxis
    job = seven.submit(1, site_folder / "refused", recipe="tiny", options=("--nodes=2",))
    assert seven.wait(job) == "FAILED", seven.log(job)
    seven.edit("HIVE_SRUN=()")
    said = "did not finish its check: srun: unrecognized option '--container-image=x'"
    assert set(faults(seven, job).values()) == {said}


def test_checks_can_be_switched_off(seven: SlurmSite, site_folder: Path) -> None:
    run = site_folder / "unchecked"
    seven.edit("HIVE_SCRATCH=/run/scratch HIVE_PREFLIGHT=0")
    job = seven.submit(1, run, "--spares", "1", recipe="tiny", options=("--nodes=2",))
    assert seven.wait(job) == "COMPLETED", seven.log(job)
    assert trained_on(run, job) == {"node1"}
    assert not (run / "stage1" / "attempts" / f"{job}.0" / "preflight").exists()


@pytest.mark.long
def test_first_node_that_nobody_meets_is_left_out(seven: SlurmSite, site_folder: Path) -> None:
    """The others try again without it."""
    run = site_folder / "nobody"
    seven.edit("HIVE_SCRATCH=/run/scratch HIVE_PREFLIGHT=1")
    job = seven.submit(1, run, "--spares", "1", recipe="tiny", options=("--nodes=3", "--hold"))
    port = 12000 + job * 13  # of body.sh; whoever listens there does not speak the store's language
    with seven.cluster.listening("node1", port):
        seven.login("scontrol", "release", str(job))
        assert seven.wait(job) == "COMPLETED", seven.log(job)
    assert faults(seven, job)["node1"].startswith(f"did not meet the others on node1, port {port}: ")
    assert set(faults(seven, job)) == {"node1"}
    assert "2 of 3 nodes are good, 2 needed" in seven.log(job)
    assert trained_on(run, job) == {"node2", "node3"}
