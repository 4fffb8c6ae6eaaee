"""Slurm's programs as scripts of no weight, and a stage's job run with them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SLURM = Path(__file__).parents[2] / "slurm"
PROGRAMS = {
    "srun": r"""
        (IFS=$'\t' && echo "$*") >>asked
        on=$(sed 's/.* --nodelist \([^ ]*\) .*/\1/; y/,/ /' <<<"$*") checks=${@: -1}
        case "$*" in
        *" node --ranks "*) eval "$CHECK" ;;
        *" network --nodes "*) eval "$NETWORK" ;;
        *) eval "$TRAIN" ;;
        esac
    """,
    "scontrol": r"""
        if [ "$1" = show ]; then printf '%s\n' $NODES; else echo "$*" >>told; fi
        if [ "$1" = requeue ]; then eval "$REQUEUE"; fi
    """,
    "squeue": r"""
        case "$*" in
        *%x) echo "$EXCLUDED" ;;
        *) echo "$END" ;;
        esac
    """,
    "sleep": "echo $1 >>slept; [ $1 -ge 300 ] || exec /bin/sleep $1",
}
"""NODES, EXCLUDED and END are what Slurm knows, REQUEUE what it does to a job that goes back to the queue. TRAIN, CHECK
and NETWORK are what its steps do, the last two for the nodes ``on``, whose findings go to the folder ``checks``."""

KNOWN = {
    "NODES": "n1 n2",
    "EXCLUDED": "",
    "REQUEUE": "",
    "END": "N/A",
    "CHECK": 'for node in $on; do touch "$checks/$node.json"; done',
    "NETWORK": 'echo "all-reduce of 2 nodes: 1.00 GB/s" >"$checks/network"',
    "TRAIN": "touch run/stage1/DONE",
}


def make_site(site: Path) -> None:
    """A folder with a copy of the scripts, whose jobs find nothing of Slurm but what is above."""
    shutil.copytree(SLURM, site / "slurm")
    (site / "bin").mkdir()
    for name, script in PROGRAMS.items():
        (site / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (site / "bin" / name).chmod(0o755)


def train(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the job of stage 1 in this folder, a site."""
    return run_job("stage1.sh", "--run", "run", *arguments, **variables)


def run_job(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a job in this folder, a site."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "HIVE"))}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    job |= {"SLURM_JOB_CPUS_PER_NODE": "8(x2)", "SLURM_CPUS_ON_NODE": "8"}
    own = {"PATH": f"{os.getcwd()}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": os.getcwd()}
    return subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        env={**outer, **job, **own, **KNOWN, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def edit(line: str) -> None:
    """Add a line to env.sh."""
    with Path("slurm/env.sh").open("a") as env:
        env.write(f"{line}\n")


def lines(name: str) -> list[str]:
    """Of a file, where there is one."""
    return Path(name).read_text().splitlines() if Path(name).exists() else []


def trained_on() -> list[str]:
    """What srun was asked for by the last step that trained, without its log."""
    words = [line.split("\t") for line in lines("asked") if "node.sh" in line][-1]
    log = words.index("--output")
    return words[:log] + words[log + 2 :]
