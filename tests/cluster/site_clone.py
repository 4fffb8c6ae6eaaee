"""The ``slurm/`` folder as a user has it: a clone whose `env.sh` alone is edited, and jobs submitted from it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from minicluster import MiniCluster, python_folders, wait_for
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]

EDITS = """
HIVE_PYTHON={python}
HIVE_CPU_RANKS={ranks}
export PYTHONPATH={path} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu TOKENIZERS_PARALLELISM=false
"""


@dataclass(frozen=True)
class SlurmSite:
    """A clone, and the cluster that its jobs run on."""

    clone: Path
    cluster: MiniCluster

    @classmethod
    def make(cls, folder: Path, cluster: MiniCluster, *, ranks: int = 1, trainer: Path | None = None) -> SlurmSite:
        """Copy the scripts to a new folder in ``folder``; ``trainer`` holds modules that replace those of hive_ds."""
        clone = Path(tempfile.mkdtemp(prefix="clone-", dir=folder))
        shutil.copytree(REPOSITORY / "slurm", clone / "slurm")
        path = ":".join(str(one) for one in (trainer, REPOSITORY) if one)
        with (clone / "slurm" / "env.sh").open("a") as env:
            env.write(EDITS.format(python=sys.executable, ranks=ranks, path=path))
        return cls(clone, cluster)

    @staticmethod
    def shared_folders(folder: Path) -> tuple[Path, ...]:
        """What the nodes must see to run jobs of clones in ``folder``."""
        return (folder, *python_folders())

    def edit(self, line: str) -> None:
        """Add a line to env.sh."""
        with (self.clone / "slurm" / "env.sh").open("a") as env:
            env.write(f"{line}\n")

    def login(self, *command: str) -> str:
        """Run a command in the clone's folder on the login host."""
        return self.cluster.run("env", f"--chdir={self.clone}", *command)

    def submit(self, stage: int, run: Path, *arguments: str, recipe: Path | str, options: tuple[str, ...] = ()) -> int:
        """Submit a stage; returns the job's number."""
        script = f"slurm/stage{stage}.sh"
        given = ("--recipe", str(recipe), "--run", str(run), *arguments)
        return int(self.login("sbatch", "--parsable", *options, script, *given))

    def wait(self, job: int, seconds: float = 240) -> str:
        """Wait for the end of a job, starting it again at once where it was requeued; returns its last state."""

        def ended() -> str | None:
            self.start_again(job)
            state = self.state(job)
            if state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"):
                seen.clear()
                return None
            seen.append(state)
            # A job on its way back to the queue passes through FAILED.
            return state if state in ("COMPLETED", "CANCELLED") or len(seen) > 10 else None

        seen: list[str] = []
        return str(wait_for(ended, seconds, f"job {job}\n{self.log(job)}", every=0.3))

    def start_again(self, job: int) -> None:
        """Start a requeued job at once; Slurm would wait two minutes."""
        if self.state(job) == "PENDING" and self.field(job, "Reason") == "BeginTime":
            time.sleep(2)  # nodes refuse a job that starts in the second in which they ended it
            self.cluster.start("scontrol", "update", f"JobId={job}", "StartTime=now")

    def state(self, job: int) -> str:
        """State of a job, as COMPLETED."""
        return self.field(job, "JobState")

    def field(self, job: int, name: str) -> str:
        """One value of ``scontrol show job``."""
        found = re.search(rf"\b{name}=(\S*)", self.cluster.run("scontrol", "show", "job", str(job)))
        assert found, name
        return found[1]

    def log(self, job: int) -> str:
        """What a job's script printed."""
        return "".join(path.read_text() for path in self.clone.rglob(f"*-{job}.log"))


def same_weights(first: Path, second: Path) -> bool:
    """Whether the models that stage 1 of two runs left are equal in every bit."""
    a, b = (load_file(run / "stage1" / "model" / "model.safetensors") for run in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def training_lines(run: Path) -> list[dict[str, Any]]:
    """Loss and samples by step, of the whole of stage 1."""
    lines = map(json.loads, (run / "stage1" / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in ("step", "loss", "samples")} for line in lines if line["event"] == "train"]
