"""Whatever starts the ranks, they find one another and train the same."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from site_clone import REPOSITORY, SlurmSite, training_lines
from ssh_hosts import BINARIES, Hosts
from tiny_run import TinyRun

pytestmark = pytest.mark.cluster
MODULE = "hive_ds.train"
FEW = ("--set", "stages.connector_pretraining.steps=3")
MEET = """
import os
from hive_ds.training.distributed import read_world, start, sum_over_ranks
world = read_world(os.environ)
total, = sum_over_ranks([2.0**world.rank], start(world))
print(world.rank, world.local_rank, world.local_size, int(total), os.environ["MASTER_ADDR"])
"""


@pytest.fixture(scope="module")
def losses(tiny: TinyRun) -> list[dict[str, float]]:
    """Of three steps on two ranks of one host, under plain torchrun."""
    done = tiny.train(1, "reference", *FEW, launcher="torchrun")
    assert done.returncode == 0, done.stdout + done.stderr
    return training_lines(tiny.root / "reference")


@pytest.mark.long
def test_ranks_of_srun_find_one_another(hosts: Hosts) -> None:
    command = hosts.command("srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-c", MEET)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} {rank % 2} 2 15 node1" for rank in range(4)]


def srun_per_rank(hosts: Hosts, train: list[str]) -> list[str]:
    return ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", MODULE, *train]


def srun_deepspeed_a_node(hosts: Hosts, train: list[str]) -> list[str]:
    hostfile = hosts.hostfile("node1 slots=1", "node2 slots=1")
    launch = f"{BINARIES}/deepspeed --no_ssh --node_rank $SLURM_NODEID --hostfile {hostfile} --master_addr node1"
    command = f'{launch} --module hive_ds.train "$@"'
    return ["srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", command, "node", *train]


def deepspeed_launcher_slurm(hosts: Hosts, train: list[str]) -> list[str]:
    hostfile = hosts.hostfile("node1 slots=1", "node2 slots=1")
    launch = [f"{BINARIES}/deepspeed", "--launcher", "slurm", "--hostfile", hostfile]
    return ["salloc", "--nodes=2", "--ntasks-per-node=1", *launch, f"{REPOSITORY}/hive_ds/train.py", *train]


def torchrun_by_hand_on_two_hosts(hosts: Hosts, train: list[str]) -> list[str]:
    variables = (f"PYTHONPATH={REPOSITORY}", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1")
    launch = ("env", *variables, f"{BINARIES}/torchrun", "--nnodes=2", "--nproc-per-node=1", "--master-addr=node1")
    first, second = (
        shlex.join(["ssh", f"node{number + 1}", shlex.join([*launch, f"--node-rank={number}", "-m", MODULE, *train])])
        for number in (0, 1)
    )
    return ["bash", "-c", f"{second} & {first} && wait $!"]


def deepspeed_hostfile(hosts: Hosts, train: list[str]) -> list[str]:
    hostfile = hosts.hostfile("# the mini cluster", "", "node1 slots=1", "node2 slots=1")
    assert hosts.hive_ds("hosts", "env", hostfile).returncode == 0
    return [f"{BINARIES}/deepspeed", "--hostfile", hostfile, "--module", MODULE, *train]


def hive_ds_hosts_run(hosts: Hosts, train: list[str]) -> list[str]:
    code = "import sys; from hive_ds.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, "hosts", "run", hosts.hostfile("node1 slots=1", "node2 slots=1"), "--", *train]


@pytest.mark.long
@pytest.mark.parametrize(
    "launcher",
    [
        srun_per_rank,
        srun_deepspeed_a_node,
        deepspeed_launcher_slurm,
        torchrun_by_hand_on_two_hosts,
        deepspeed_hostfile,
        hive_ds_hosts_run,
    ],
)
def test_two_hosts_train_as_one(
    hosts: Hosts, tiny: TinyRun, losses: list[dict[str, float]], launcher: Callable[[Hosts, list[str]], list[str]]
) -> None:
    command = hosts.command(*launcher(hosts, tiny.arguments(1, launcher.__name__, *FEW)))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert training_lines(tiny.root / launcher.__name__) == losses


@pytest.mark.long
def test_job_script_trains_the_same(
    hosts: Hosts, site_folder: Path, tiny: TinyRun, losses: list[dict[str, float]]
) -> None:
    site, run = SlurmSite.make(site_folder, hosts.cluster), tiny.root / "job-script"
    job = site.submit(1, run, *FEW, recipe=tiny.root / "recipe.yaml", options=("--nodes=2",))
    assert site.wait(job) == "COMPLETED", site.log(job)
    assert training_lines(run) == losses


@pytest.mark.long
def test_deepspeed_on_one_host_trains_the_same(tiny: TinyRun, losses: list[dict[str, float]]) -> None:
    done = tiny.train(1, "deepspeed", *FEW, launcher="deepspeed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert training_lines(tiny.root / "deepspeed") == losses
