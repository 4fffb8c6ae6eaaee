"""Seconds of a training step of the quickstart, this version beside the first one (docs/results/cpu_step.json).

    git worktree add --detach /tmp/first 864a518
    python docs/results/cpu_step.py /tmp/first /tmp/cpu-step --out docs/results/cpu_step.json

Both train the same base models on the same scenes with the same batches, each under its own recipe `tiny` (ZeRO-3) and
its own launcher settings, on 2 ranks; this version once more under ZeRO-0, which splits nothing. Runs alternate, and
the fastest run of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hive_ds.quickstart.pipeline import Quickstart
from hive_ds.quickstart.settings import SMOKE
from hive_ds.stages import HIVE_STAGES
from hive_ds.versions import made_with

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARM_UP = 24, 8
"""Of each stage in each run; the first ones do not count."""
FORMS = {"first": (), "now": (), "now under zero0": ("training.ds_config=zero0",)}
"""What is timed, and the overrides that it alone has; only the first is of the first version."""
SAME = ("data.text_validation=null", "data.validation=null", "training.checkpoint_interval=0")


def importable(tree: Path, folder: Path) -> Path:
    """Links from which ``hive_ds`` of the checkout ``tree`` imports, kernels included, whatever is installed."""
    package = folder / "hive_ds"
    package.mkdir(parents=True, exist_ok=True)
    links = {entry.name: entry for entry in (tree / "hive_ds").iterdir() if entry.name != "__pycache__"}
    links |= {"kernels": tree / "kernels" / "hive_kernels", "ds_configs": tree / "ds_configs"}
    for name, target in links.items():
        if not (package / name).exists():
            (package / name).symlink_to(target.resolve())
    return folder


def run_stage(
    extra: Sequence[str], tree: Path, run: Path, base: Quickstart, stage: int, environment: dict[str, str], port: int
) -> float:
    """Median seconds of a step of a stage, under ``extra`` overrides."""
    overrides = [
        f"model.vision_encoder={base.vision_encoder}",
        f"model.language_model={base.language_model}",
        f"data.train={base.folders.train}",
        *SAME,
        *extra,
        *(f"stages.{one.name}.{key}" for one in HIVE_STAGES for key in (f"steps={STEPS}", "lr=1e-4")),
        *(f"stages.{one.name}.{key}" for one in HIVE_STAGES for key in ("global_batch_size=32", "micro_batch_size=16")),
    ]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    command += ["--num_accelerators", "2", "--module", "hive_ds.train", "--recipe", "tiny"]
    command += ["--stage", str(stage), "--run", str(run)]
    command += [part for override in overrides for part in ("--set", override)]
    path = [str(importable(tree, run.parent / f"{run.name}-tree"))]
    environment = {**environment, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, cwd=run.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: stage {stage} failed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (run / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["seconds_per_step"] for line in lines if line["event"] == "train"]
    return statistics.median(steps[WARM_UP:])


def commit_of(tree: Path) -> str:
    """The commit checked out there, with a mark if files differ from it."""
    git = ["git", "-C", str(tree)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head + ("+changes" if changed else "")


def base_of(work: Path) -> Quickstart:
    """Data and base models in ``work``, made if they are not there."""
    base = Quickstart(work.resolve() / "base", 0, replace(SMOKE, scenes=2048, held_out=24, text=64))
    if not base.vision_encoder.is_dir():
        base._scenes()
        base._base_models()
    return base


def threads_and_environment() -> tuple[int, dict[str, str]]:
    """Threads of each of two ranks on this machine's CPUs, and the variables of their launch."""
    threads = max(1, (os.cpu_count() or 1) // 2)
    return threads, {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}


def main() -> None:
    """Make what both need, run them in turn, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", type=Path, help="checkout of the first version")
    parser.add_argument("work", type=Path, help="folder for data, models and runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = base_of(options.work)
    threads, environment = threads_and_environment()
    seconds: dict[str, dict[int, list[float]]] = {name: {stage: [] for stage in options.stages} for name in FORMS}
    for repeat in range(options.repeats):
        for number, name in enumerate(FORMS):
            tree = options.first.resolve() if name == "first" else ROOT
            run = options.work.resolve() / f"{name}-{repeat}-{os.getpid()}".replace(" ", "-")
            for stage in options.stages:
                found = run_stage(
                    FORMS[name], tree, run, base, stage, environment, 29700 + len(FORMS) * repeat + number
                )
                seconds[name][stage].append(found)
                print(f"{name}, stage {stage}: {found:.3f} s a step", flush=True)
    best = {name: {stage: min(times) for stage, times in by_stage.items()} for name, by_stage in seconds.items()}
    record = {
        "what": f"median seconds of a step in each run of {STEPS}, the first {WARM_UP} left out, 2 ranks, batch 32",
        **made_with(),
        "commits": {"first": commit_of(options.first.resolve()), "now": commit_of(ROOT)},
        "threads_per_rank": threads,
        "seconds": seconds,
        "fastest": best,
        "times_faster": {
            name: {stage: best["first"][stage] / best[name][stage] for stage in options.stages}
            for name in FORMS
            if name != "first"
        },
    }
    print(json.dumps(record["times_faster"]))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
