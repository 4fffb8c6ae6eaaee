"""Slurm's scripts started by hand, outside of a job: one clear line, or the comment at their head."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"
JOBS = sorted(path.name for path in SLURM.glob("*.sh") if "\n#SBATCH" in path.read_text())


def by_hand(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "HIVE"))}
    command = ["bash", str(SLURM / script), *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", JOBS)
def test_a_job_script_says_how_to_submit_it(script: str, tmp_path: Path) -> None:
    said = by_hand(script, "--recipe", "tiny", folder=tmp_path)
    assert said.returncode == 2
    assert said.stdout == ""
    assert said.stderr.startswith(
        f"error: slurm/{script} runs as a job; submit it in the clone's folder: sbatch slurm/"
    )
    assert said.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--help",), ("--nodes", "2", "-h")])
@pytest.mark.parametrize("script", [*JOBS, "pipeline.sh"])
def test_help_is_the_comment_at_the_head(script: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    said = by_hand(script, *arguments, folder=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    head = [line for line in (SLURM / script).read_text().split("\nset -", 1)[0].splitlines()[1:] if line[:2] != "#S"]
    assert len(head) >= 2
    assert said.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a copy of the scripts, and an sbatch that only writes down what it is asked for."""
    shutil.copytree(SLURM, tmp_path / "slurm")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {"squeue": "", "sbatch": f'echo "$@" >>{tmp_path}/asked; wc -l <{tmp_path}/asked'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    return tmp_path


def submit(line: str, python: str, site: Path) -> list[str]:
    """What the chain's script says and, in ``asked``, asks for."""
    with (site / "slurm" / "env.sh").open("a") as env:
        env.write(f"\nHIVE_PYTHON={shlex.quote(python)}\n")
    path = {"PATH": f"{site}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(line, shell=True, env={**os.environ, **path}, cwd=site, capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
    return said.stdout.splitlines()


def test_the_first_chain_of_the_cluster_page_is_submitted(site: Path) -> None:
    """The page's own line."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    line = re.search(r"^slurm/pipeline\.sh (.*\\\n)*.*", page, re.M)[0].replace("/shared/", f"{site}/")
    said = submit(line, sys.executable, site)
    jobs = [f"stage{number}: job {number}" for number in (1, 2, 3)]
    assert [words.split(",")[0] for words in said] == [*jobs, "export: job 4"]
    asked = (site / "asked").read_text().splitlines()
    assert all(f"--set data.train={site}/my-captions --set data.validation=null" in one for one in asked[:3])


def test_a_run_folder_has_one_name_however_it_is_written(site: Path) -> None:
    """By it the chain's script knows which jobs are queued."""
    for run in ("runs/a", "runs/a/", "./runs/../runs/a", f"{site}/runs//a"):
        submit(f"slurm/pipeline.sh --recipe tiny --run {run}", "/not/on/the/login/node", site)
    assert set(re.findall(r"--comment (\S+)", (site / "asked").read_text())) == {f"{site}/runs/a"}


def test_options_of_sbatch_reach_the_jobs_that_they_are_for(site: Path) -> None:
    with (site / "slurm" / "env.sh").open("a") as env:
        env.write(
            "\nHIVE_STAGES='3 4' HIVE_EVAL=(mme /data) HIVE_GPU_JOB=(--oversubscribe) HIVE_CPU_JOB=('--mem=8 G')\n"
        )
    submit("slurm/pipeline.sh --recipe tiny", "/not/on/the/login/node", site)
    asked = (site / "asked").read_text().splitlines()
    found = [[option for option in ("--oversubscribe", "--mem=8 G") if option in one] for one in asked]
    assert found == [["--oversubscribe"], ["--mem=8 G"], ["--oversubscribe"], ["--oversubscribe"]]


def test_what_a_chain_asks_for(site: Path) -> None:
    """Each job after the one before, but what is done or queued; no GPUs for jobs that need none."""
    run = site / "runs" / "a"
    (run / "stage2").mkdir(parents=True)
    (run / "stage2" / "DONE").touch()
    with (site / "slurm" / "env.sh").open("a") as env:
        env.write("\nHIVE_STAGES='1 2 3 4 5' HIVE_CONVERT=(a.json mds) HIVE_EVAL=(mme /data)\n")
        env.write("export SBATCH_GPUS_PER_NODE=8\n")
    queued = f'case "$*" in *hive-stage3*) echo "70 {run}-other"; echo "77 {run}" ;; esac'
    told = f'echo "$@" "${{SBATCH_GPUS_PER_NODE-none}}" >>{site}/asked; echo "$(wc -l <{site}/asked);federated"'
    for name, script in {"squeue": queued, "sbatch": told}.items():
        (site / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    said = submit("slurm/pipeline.sh --run runs/a --nodes 4 --spares 1", "/not/on/the/login/node", site)
    assert said == [
        *("convert: job 1", "stage1: job 2, after 1", "stage2: done already"),
        *("stage3: job 77 is queued or running", "export: job 3, after 77"),
        *("stage4: job 4, after 3", "stage5: job 5, after 4", "eval: job 6, after 5"),
    ]
    asked = [re.sub(r" --output \S+", "", line) for line in (site / "asked").read_text().splitlines()]
    given = "--run runs/a --spares 1"
    expected = [
        ("convert", "", "convert.sh", "none"),
        ("stage1", " --dependency afterok:1 --nodes 4", f"stage1.sh {given}", "8"),
        ("export", " --dependency afterok:77", f"export.sh {run}", "none"),
        ("stage4", " --dependency afterok:3 --nodes 4", f"vlm.sh {given}", "8"),
        ("stage5", " --dependency afterok:4 --nodes 4", f"vlm.sh {given}", "8"),
        ("eval", " --dependency afterok:5", f"eval.sh {run}", "8"),
    ]
    always = f"--parsable --kill-on-invalid-dep=yes --comment {run}"
    assert asked == [
        f"{always} --job-name hive-{name}{options} {site}/slurm/{script} {gpus}"
        for name, options, script, gpus in expected
    ]


def test_a_chain_of_vlm_stages_alone_exports_nothing_and_ends_where_slurm_refuses(site: Path) -> None:
    with (site / "slurm" / "env.sh").open("a") as env:
        env.write("\nHIVE_STAGES='4 5' HIVE_PYTHON=/not/on/the/login/node\n")
    refusing = f'echo "$@" >>{site}/asked; echo "no such account" >&2; exit 1'
    (site / "bin" / "sbatch").write_text(f"#!/bin/sh\n{refusing}\n")
    environment = {**os.environ, "PATH": f"{site}/bin:{os.environ['PATH']}"}
    said = subprocess.run(["slurm/pipeline.sh"], env=environment, cwd=site, capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (1, "", "no such account\n")
    (asked,) = (site / "asked").read_text().splitlines()
    assert "--job-name hive-stage4" in asked
    assert "--nodes 1 " in asked


@pytest.mark.parametrize(
    ("site_sets", "asked"),
    [("", "none"), ("ALL", "ALL"), ("ALL,A=1", "ALL,A=1"), ("NONE", "HIVE_DS"), ("NIL", "HIVE_DS"), ("A", "A,HIVE_DS")],
)
def test_jobs_of_a_chain_find_their_scripts_where_a_site_keeps_the_environment_from_them(
    site_sets: str, asked: str, site: Path
) -> None:
    """Called from outside of the clone."""
    (site / "elsewhere").mkdir()
    if site_sets:
        with (site / "slurm" / "env.sh").open("a") as env:
            env.write(f"\nexport SBATCH_EXPORT={site_sets}\n")
    (site / "bin" / "sbatch").write_text(
        f'#!/bin/sh\necho "${{SBATCH_EXPORT-none}} $HIVE_DS" >>{site}/asked; wc -l <{site}/asked\n'
    )
    submit("cd elsewhere && ../slurm/pipeline.sh --recipe tiny --run ../run", "/not/on/the/login/node", site)
    assert (site / "asked").read_text().splitlines() == [f"{asked} {site}"] * 4


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("HIVE_CONVERT='a.json mds'", "HIVE_CONVERT in env.sh is (a.json mds); expected (SOURCE OUT OPTION...)"),
        ("HIVE_EVAL='mme /data'", "HIVE_EVAL in env.sh is (mme /data); expected (BENCHMARKS DATA OPTION...)"),
    ],
)
def test_a_list_that_is_written_as_text_submits_nothing(line: str, error: str, site: Path) -> None:
    """It would be noticed when all stages are trained."""
    with (site / "slurm" / "env.sh").open("a") as env:
        env.write(f"\n{line} HIVE_PYTHON=/not/on/the/login/node\n")
    environment = {**os.environ, "PATH": f"{site}/bin:{os.environ['PATH']}"}
    said = subprocess.run(["slurm/pipeline.sh"], env=environment, cwd=site, capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (2, "", f"error: {error}\n")
    assert not (site / "asked").exists()
