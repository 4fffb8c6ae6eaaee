"""Run the runs of an ablation on this machine, or submit each to a cluster."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from hive_ds.ablation.plan import ArmRun
from hive_ds.children import Programs
from hive_ds.errors import HiveError


def run_all(runs: Sequence[ArmRun], launcher: Sequence[str], *, after: str | None = None, jobs: int = 1) -> None:
    """Train the stages that are not finished, ``jobs`` runs at a time; a run that fails does not end the others.

    Args:
        runs: of `make_plan`.
        launcher: command that `hive_ds.train`'s arguments are added to.
        after: command for every run whose stages are all finished, also for those that were finished before;
            ``{run}`` in it stands for the run's folder.
        jobs: runs at a time; they share out the cores of this machine, unless OMP_NUM_THREADS is set.

    Raises:
        HiveError: names the runs that failed and where their messages are.
    """
    environment = _environment(jobs)
    bar = tqdm(total=sum(len(run.stages) for run in runs), unit="stage", dynamic_ncols=True)

    def work(run: ArmRun) -> str | None:
        for stage in run.stages:
            if not run.done(stage):
                failed = _train(run, stage, launcher, environment, programs)
                if failed:
                    return failed
            bar.update()
        return None if after is None else _run_after(run, after, environment, programs)

    with ThreadPoolExecutor(jobs) as pool, Programs() as programs:
        failures = [failure for failure in pool.map(work, runs) if failure]
    bar.close()
    if failures:
        raise HiveError(f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures)}")


def _environment(jobs: int) -> dict[str, str]:
    """Threads of two runs that all want every core wait for one another far longer than they compute."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    return {**({"OMP_NUM_THREADS": str(threads)} if jobs > 1 else {}), **os.environ}


def _run_after(run: ArmRun, command: str, environment: Mapping[str, str], programs: Programs) -> str | None:
    """Run the command that follows a run; returns what to say where it failed."""
    full = [part.replace("{run}", str(run.folder)) for part in shlex.split(command)]
    try:
        code = programs.run(full, environment)
    except OSError as error:
        return f"{run.name}: {shlex.join(full)} did not start: {error.strerror}"
    return f"{run.name}: {shlex.join(full)} ended with exit code {code}" if code else None


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


def _train(
    run: ArmRun, stage: int, launcher: Sequence[str], environment: Mapping[str, str], programs: Programs
) -> str | None:
    """Train one stage; returns what to say where it failed."""
    arguments = ["--recipe", str(run.recipe), "--stage", str(stage), "--run-folder", str(run.folder)]
    log = Path(run.folder) / f"stage{stage}.log"
    with log.open("a") as output:
        code = programs.run([*launcher, *arguments], environment, output)
    if code == 0 and run.done(stage):
        return None
    return f"{run.name} stage {stage} with exit code {code}, see {log}"
