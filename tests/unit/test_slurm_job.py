"""How a stage's job starts its trainer, and goes on after it; on real Slurm in tests/cluster."""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from slurm_stand_in import edit, lines, make_site, run_job, train, trained_on


@pytest.fixture(autouse=True)
def in_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(tmp_path / "a site")
    monkeypatch.chdir(tmp_path / "a site")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "128(x2)"}, "128"),
        ({"SLURM_JOB_CPUS_PER_NODE": "128(x2),64,96(x2)"}, "64"),  # each node is asked for as many
        ({"SLURM_CPUS_PER_TASK": "16"}, "16"),
        ({"SLURM_CPUS_PER_TASK": "1"}, "8"),  # what a job has that was submitted from within another
    ],
)
def test_ranks_get_the_cpus_that_every_node_has(variables: dict[str, str], expected: str) -> None:
    edit("HIVE_PREFLIGHT=0")
    done = train(**{"TRAIN": 'echo "$SRUN_CPUS_PER_TASK" >cpus; touch run/stage1/DONE', **variables})
    assert done.returncode == 0, done.stderr
    assert Path("cpus").read_text() == f"{expected}\n"


def test_what_the_trainer_is_started_with() -> None:
    edit("HIVE_PREFLIGHT=0 HIVE_SRUN=(--container-image='a b')")
    given = {"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS": "16", "SLURM_EXPORT_ENV": "NONE", "SLURM_JOB_ID": "12345678"}
    keep = (
        'echo "${SLURM_GPUS-none} $HIVE_RANKS $HIVE_MASTER $HIVE_ATTEMPT $HIVE_PORT $SLURM_EXPORT_ENV" >variables;'
        "touch run/stage1/DONE"
    )
    done = train("--recipe", "tiny", "--set", "data.train=a b", "--debug", TRAIN=keep, SLURM_RESTART_COUNT="3", **given)
    assert (done.returncode, done.stderr) == (0, "")
    nodes = ["--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--nodelist", "n1,n2"]
    step = [*nodes, "--kill-on-bad-exit=1", "--gpus-per-node", "8", "--container-image=a b"]
    trainer = ["bash", f"{os.getcwd()}/slurm/node.sh", "--recipe", "tiny", "--stage", "1"]
    own = ["--run-folder", f"{os.getcwd()}/run", "--set", "data.train=a b", "--debug"]
    assert trained_on() == [*step, *trainer, *own]
    assert lines("variables") == ["none 8 n1 12345678.3 25817 ALL"]


def test_what_a_job_was_started_with_is_kept() -> None:
    Path("my recipe.yaml").write_text("base: tiny")
    edit("HIVE_PREFLIGHT=0 HIVE_CPU_RANKS=3")
    done = train("--recipe", "my recipe.yaml", TRAIN='echo "$HIVE_RANKS" >ranks; touch run/stage1/DONE')
    assert done.returncode == 0
    assert trained_on()[-5:] == [f"{os.getcwd()}/my recipe.yaml", "--stage", "1", "--run-folder", f"{os.getcwd()}/run"]
    assert lines("ranks") == ["3"]
    logs = Path("run/stage1/attempts/7.0")
    assert (logs / "recipe.yaml").read_text() == "base: tiny"
    recipe = f"{os.getcwd()}/my recipe.yaml"
    assert shlex.split((logs / "arguments").read_text()) == [recipe, "--run", "run", "--recipe", "my recipe.yaml"]
    again = train()
    assert (again.returncode, len(lines("asked"))) == (0, 1)
    assert f"stage 1 of {os.getcwd()}/run is done already" in again.stdout


@pytest.mark.parametrize(
    ("restarts", "latest", "ends", "expected"),
    [
        (0, "", "touch run/stage1/DONE; exit 1", (0, [])),  # srun may fail after the ranks have ended well
        (0, "", "exit 0", (1, ["requeue 7"])),
        (0, "", "code 0 2", (2, [])),
        (1, "", "code 2", (2, [])),
        (0, "step-5", "code 2", (2, [])),
        (1, "step-5", "code 0 2", (1, ["requeue 7"])),  # the input was right before
        (1, "step-5", "code 0 126", (2, [])),
        (1, "step-5", "code 127", (2, [])),
        (0, "", "code 85 143", (85, [])),
        (0, "", "code 85 $(yes 143 | head -n 300)", (85, [])),
        (0, "", "code 2 $(yes 143 | head -n 300)", (2, [])),
        (0, "", "code 85; touch run/stage1/DONE", (0, [])),
        (0, "", "code 132 1", (1, ["requeue 7"])),  # which is no 2
        (4, "", "code 137", (1, ["requeue 7"])),
        (5, "", "code 137", (1, [])),  # no restart is left
    ],
)
def test_how_a_job_goes_on(restarts: int, latest: str, ends: str, expected: tuple[int, list[str]]) -> None:
    """``code`` is what each node's launcher ended with."""
    edit("HIVE_PREFLIGHT=0 HIVE_MAX_RESTARTS=5")
    Path("run/stage1").mkdir(parents=True)
    Path("run/stage1/STOP").touch()  # of an attempt before
    if latest:
        Path("run/stage1/latest").write_text(latest)
    code = 'code() { rm run/stage1/STOP 2>/dev/null; for one; do echo "$one" >"$HIVE_LOGS/n$((++n)).code"; done; }'
    done = train(TRAIN=f"[ ! -e run/stage1/STOP ] || exit; {code}; {ends}", SLURM_RESTART_COUNT=str(restarts))
    assert (done.returncode, lines("told")) == expected, done.stdout


def test_failures_are_counted_by_checkpoint() -> None:
    edit("HIVE_PREFLIGHT=0 HIVE_MAX_FAILURES=3")
    told = []
    for attempt, latest in enumerate(["step-1", "step-1", "step-2", "step-2", "step-2"]):
        save = f"printf {latest} >run/stage1/latest; echo 1 >$HIVE_LOGS/n1.code"
        done = train(TRAIN=save.replace("$HIVE_LOGS", '"$HIVE_LOGS"'), SLURM_RESTART_COUNT=str(attempt))
        assert done.returncode == 1
        told.append("giving up" if "failed 3 times without a new checkpoint: giving up" in done.stdout else "again")
    assert told == ["again"] * 4 + ["giving up"]
    assert lines("told") == ["requeue 7"] * 4
    assert train(TRAIN="exit 1").returncode == 1  # whoever submits it again has mended something
    assert lines("told") == ["requeue 7"] * 5


def test_time_is_up() -> None:
    """By a signal, and by the time where the signal does not come."""
    edit("HIVE_PREFLIGHT=0")
    stop = "while [ ! -e run/stage1/STOP ]; do :; done; /bin/sleep 0.5; echo saved >>told"
    done = train(TRAIN=f'kill -USR1 $PPID; {stop}; echo 85 >"$HIVE_LOGS/n1.code"', HIVE_STOP_PATIENCE="4")
    assert (done.returncode, lines("told")) == (1, ["saved", "requeue 7"]), done.stdout
    assert "time is up: requeueing the job" in done.stdout
    begun = time.monotonic()
    deaf = train(TRAIN="kill -USR1 $PPID; exec /bin/sleep 50")
    assert (deaf.returncode, lines("told")[2:]) == (1, ["requeue 7"]), deaf.stdout
    assert "no answer: ending the trainer" in deaf.stdout
    assert time.monotonic() - begun < 40
    assert sorted(lines("slept")) == ["300", "300", "4", "480"]  # 300 s for Slurm to end the script
    now = int(time.time())
    ends = {seconds: time.strftime("%FT%T", time.localtime(now + seconds)) for seconds in (1700, 7200)}
    keep = 'echo ${HIVE_STOP_AT-none} >at; echo 85 >"$HIVE_LOGS/n1.code"'
    assert train(TRAIN=keep, END=ends[1700]).returncode == 85
    assert lines("at") == ["none"]
    assert train(TRAIN=keep, END=ends[7200]).returncode == 85
    assert lines("at") == [str(now + 7200 - 540)]
    assert "time is up" in train(TRAIN=keep, HIVE_STOP_AT="1").stdout
    assert "failed: requeueing" in train(TRAIN=keep.replace("85", "137"), HIVE_STOP_AT="1").stdout


def test_environment_is_kept_without_secrets() -> None:
    edit("HIVE_PREFLIGHT=0")
    kept = {"NCCL_P2P_DISABLE": "1", "HF_HOME": "/a b", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    left = {"HF_TOKEN": "x", "HIVE_api_key": "x", "WANDB_API_KEY": "x", "HIVE_PASSWORD": "x", "HOME": "/root"}
    assert train(**kept, **left).returncode == 0
    found = dict(line.split("=", 1) for line in lines("run/stage1/attempts/7.0/environment"))
    assert {name: found.get(name) for name in (*kept, *left)} == {
        **{name: value for name, value in kept.items() if name != "TOKENIZERS_PARALLELISM"},
        **dict.fromkeys((*left, "TOKENIZERS_PARALLELISM")),
    }


HIVE = ["/a python", "-m", "hive_ds"]


@pytest.mark.parametrize(
    ("command", "expected", "done"),
    [
        (["convert.sh", "a.json", "my mds", "--workers", "2"], ["data", "convert"], "my mds/index.json"),
        (["convert.sh"], ["data", "convert", "a b.json", "mds"], "mds/index.json"),
        (["export.sh"], ["export", "encoder", "{here}/runs/tiny", "{here}/runs/tiny/encoder"], None),
        (["export.sh", "a run"], ["export", "encoder", "{here}/a run", "{here}/a run/encoder"], None),
        (["export.sh", "r", "an out", "--tail", "cut"], ["export", "encoder", "{here}/r"], "an out/config.json"),
    ],
)
def test_jobs_of_one_command(command: list[str], expected: list[str], done: str | None) -> None:
    edit("HIVE_PYTHON='/a python' HIVE_SRUN=(--container-image='a b') HIVE_CONVERT=('a b.json' mds)")
    if done:
        Path(done).parent.mkdir()  # what a job left that was killed
    ended = run_job(*command, SLURM_JOB_CPUS_PER_NODE="6", TRAIN="exit 7")
    assert (ended.returncode, ended.stderr) == (7, "")
    (asked,) = lines("asked")
    step = ["--nodes", "1", "--ntasks", "1", "--cpus-per-task", "6", "--container-image=a b", *HIVE]
    words = [word.format(here=os.getcwd()) for word in expected]
    given = command[1:] if command[0] == "convert.sh" else ([f"{os.getcwd()}/an out", *command[3:]] if done else [])
    assert asked.split("\t") == [*step, *words, *given]
    if done:
        Path(done).touch()
        assert run_job(*command).returncode == 0
        assert len(lines("asked")) == 1


@pytest.mark.parametrize(("gpus", "ask"), [({"SLURM_GPUS_ON_NODE": "8"}, ["--gpus-per-node", "8"]), ({}, [])])
def test_the_job_that_scores(gpus: dict[str, str], ask: list[str]) -> None:
    assert run_job("eval.sh", "a run").stderr == (
        "error: eval.sh needs HIVE_EVAL in env.sh: benchmarks and the folder of their data\n"
    )
    edit("HIVE_PYTHON='/a python' HIVE_EVAL=(mme,gqa '/the data' --dtype bfloat16) HIVE_CPU_RANKS=3")
    run, out = f"{os.getcwd()}/a run", f"{os.getcwd()}/a run/eval"
    assert run_job("eval.sh", "a run", TRAIN="exit 7", **gpus).returncode == 7
    assert run_job("eval.sh", "a run", "an out", "--limit", "4", TRAIN="exit 7", **gpus).returncode == 7
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8" if gpus else "3", "-m", "hive_ds"]
    step = ["--nodes", "1", "--ntasks", "1", "--cpus-per-task", "8", *ask, "/a python", *launch, "eval", run]
    what = ["--tasks", "mme,gqa", "--data", "/the data", "--out"]
    assert [line.split("\t") for line in lines("asked")] == [
        [*step, *what, out, "--dtype", "bfloat16"],
        [*step, *what, f"{os.getcwd()}/an out", "--dtype", "bfloat16", "--limit", "4"],
    ]
    Path(out).mkdir(parents=True)
    Path(out, "results.json").touch()
    assert run_job("eval.sh", "a run", **gpus).returncode == 0
    assert len(lines("asked")) == 2


NODE = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURMD_NODENAME": "n2"}
STEP = {"HIVE_ATTEMPT": "7.1", "HIVE_RANKS": "8", "HIVE_MASTER": "n1", "HIVE_PORT": "12092", "HIVE_LOGS": "the logs"}
PYTHON = """#!/bin/bash
printf '%s\\n' "$@" >arguments
touch "$TMPDIR/in-use"
ls "$HIVE_SCRATCH" >meanwhile
printf '%s\\n' "$TMPDIR" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" >folders
exit 85
"""


def test_what_runs_on_a_node() -> None:
    """Its launcher, in a folder of this attempt; other jobs' folders stay, and compiled kernels."""
    for folder in ("the logs", "a scratch/hive-7.0/left", "a scratch/hive-77.0"):
        Path(folder).mkdir(parents=True)
    Path("python").write_text(PYTHON)
    Path("python").chmod(0o755)
    paths = {"HIVE_PYTHON": "./python", "HIVE_SCRATCH": "a scratch", "TRITON_CACHE_DIR": "mine"}
    environment = {"PATH": os.environ["PATH"], **NODE, **STEP, **paths}
    done = subprocess.run(["bash", "slurm/node.sh", "--set", "x=a b"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (85, "")
    assert lines("the logs/n2.code") == ["85"]
    launch = ["-m", "hive_ds.launch.node", "--nodes", "2", "--node-rank", "1", "--ranks", "8"]
    meeting = ["--master", "n1", "--port", "12092", "--packages", "the logs/packages"]
    assert lines("arguments") == [*launch, *meeting, "--", "--set", "x=a b"]
    assert lines("meanwhile") == ["hive-7.1", "hive-77.0"]
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert lines("folders") == ["a scratch/hive-7.1", "mine", f"a scratch/hive-{user}/inductor"]
    assert os.listdir("a scratch") == ["hive-77.0"]
