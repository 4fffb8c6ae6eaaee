"""Run the runs of an ablation on this machine, or submit each to a cluster."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from hive_ds.ablation.plan import ArmRun
from hive_ds.errors import HiveError


def run_all(
    runs: Sequence[ArmRun], launcher: Sequence[str], *, after: Callable[[ArmRun], None] | None = None, jobs: int = 1
) -> None:
    """Train the stages that are not finished, ``jobs`` runs at a time; a run that fails does not end the others.

    Args:
        runs: of `make_plan`.
        launcher: command that `hive_ds.train`'s arguments are added to.
        after: called with every run whose stages are all finished, also with those that were finished before.
        jobs: runs at a time.

    Raises:
        HiveError: names the runs that failed and where their messages are.
    """
    bar = tqdm(total=sum(len(run.stages) for run in runs), unit="stage", dynamic_ncols=True)

    def work(run: ArmRun) -> str | None:
        for stage in run.stages:
            if not run.done(stage):
                failed = _train(run, stage, launcher)
                if failed:
                    return failed
            bar.update()
        if after is not None:
            after(run)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failures = [failure for failure in pool.map(work, runs) if failure]
    bar.close()
    if failures:
        raise HiveError(f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures)}")


def run_after(command: str) -> Callable[[ArmRun], None]:
    """What `run_all` calls after a run: ``command`` with the run's folder for ``{run}``.

    Raises:
        HiveError: when called, if the command fails.
    """

    def after(run: ArmRun) -> None:
        full = [part.replace("{run}", str(run.folder)) for part in shlex.split(command)]
        code = subprocess.run(full, check=False).returncode
        if code:
            raise HiveError(f"run {run.name}: {shlex.join(full)} ended with exit code {code}")

    return after


def submit_all(runs: Sequence[ArmRun], command: Sequence[str]) -> None:
    """Submit each run with ``command --recipe R --run RUN``, such as slurm/pipeline.sh, which skips what is done.

    Raises:
        HiveError: a submission failed; the ones before it stand.
    """
    for run in runs:
        full = [*command, "--recipe", str(run.recipe.absolute()), "--run", str(run.folder.absolute())]
        print(shlex.join(full), flush=True)
        code = subprocess.run(full, check=False).returncode
        if code:
            raise HiveError(f"run {run.name} was not submitted: {command[0]} ended with exit code {code}")


def _train(run: ArmRun, stage: int, launcher: Sequence[str]) -> str | None:
    """Train one stage; returns what to say where it failed."""
    arguments = ["--recipe", str(run.recipe), "--stage", str(stage), "--run-folder", str(run.folder)]
    log = Path(run.folder) / f"stage{stage}.log"
    with log.open("a") as output:
        code = subprocess.run([*launcher, *arguments], stdout=output, stderr=output, check=False).returncode
    if code == 0 and run.done(stage):
        return None
    return f"{run.name} stage {stage} with exit code {code}, see {log}"
