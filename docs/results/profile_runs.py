"""Profiles of the quickstart's stage 3 on 2 ranks of ZeRO-3, before and after what only a real run can show.

    python docs/results/profile_runs.py WORK --out docs/results/profile_runs.json

WORK is that of cpu_step.py; what is missing in it is made. "Before" is today's code with one thing undone by overrides.
Runs of both forms alternate; seconds are those of the fastest run, steps under the profiler left out, shares are rank
0's, of that run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from cpu_step import ROOT, base_of, run_stage, threads_and_environment

from hive_ds.training.ds_config import read_policy
from hive_ds.training.profile import KINDS
from hive_ds.versions import made_with

PROFILED = "training.profile=[3,8]"
"""Steps that cpu_step.py does not count."""
LAYER_BY_LAYER = 50_000
"""Elements that ZeRO-3 may keep for later; the model has more."""


def cases(work: Path) -> dict[str, dict[str, list[str]]]:
    """Overrides of both forms of each case."""
    policy = read_policy("zero3")
    policy["zero_optimization"]["stage3_max_reuse_distance"] = LAYER_BY_LAYER
    by_layers = work / "zero3-by-layers.json"
    by_layers.write_text(json.dumps(policy))
    return {
        "a small model gathered once, without hooks": {"before": [f"training.ds_config={by_layers}"], "after": []},
        "the loader in the rank's own process": {"before": ["data.num_workers=1"], "after": []},
    }


def shares(run: Path) -> dict[str, float]:
    """Shares of the kinds of work that the run's profile says."""
    (summary,) = (run / "stage3" / "profile").glob("steps-*.txt")
    found = {}
    for line in summary.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) > 2 and cells[1] in KINDS:
            found[cells[1]] = round(float(cells[2].removesuffix(" %")) / 100, 3)
    return found


def main() -> None:
    """Measure every case and print the table of the lab log."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work.resolve()
    base, (threads, environment) = base_of(work), threads_and_environment()
    port, rows = 29750, []
    start = work / f"profile-{os.getpid()}"
    for stage in (1, 2):
        run_stage([], ROOT, start, base, stage, environment, port)
    for name, forms in cases(work).items():
        runs: dict[str, list[dict[str, Any]]] = {form: [] for form in forms}
        for repeat in range(options.repeats):
            for form, overrides in forms.items():
                run, port = work / f"profile-{os.getpid()}-{port}", port + 1
                shutil.copytree(start, run)
                seconds = run_stage([*overrides, PROFILED], ROOT, run, base, 3, environment, port)
                print(f"{name}, {form}, run {repeat + 1}: {seconds:.3f} s a step", flush=True)
                runs[form].append({"seconds": seconds, "shares": shares(run)})
        row: dict[str, Any] = {"case": name, "seconds": {form: [r["seconds"] for r in runs[form]] for form in runs}}
        for form in forms:
            row[form] = min(runs[form], key=lambda one: one["seconds"])
            cells = " | ".join(f"{100 * row[form]['shares'][kind]:.0f}" for kind in KINDS)
            print(f"| {name} | {form} | {1e3 * row[form]['seconds']:.0f} | {cells} |", flush=True)
        rows.append(row)
    if options.out:
        record = {**made_with(), "threads_per_rank": threads, "stage": 3, "ranks": 2, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
