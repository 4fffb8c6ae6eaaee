"""Time the training step of a stage: ``python -m hive_ds.benchmarks.step STAGE --out FILE``, for `make gpu-suite`.

Without a GPU the same runs on tiny models, without torch.compile: that shows that it works, and times nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hive_ds.benchmarks.arms import LABELS, Arm, Setting, arm_names, build_arm, refusal, work_of
from hive_ds.benchmarks.report import table
from hive_ds.benchmarks.sizes import CAPTIONS, PAPER, TINY, Size, caption_lengths, make_batch
from hive_ds.data.batch import PackedBatch
from hive_ds.training.flops import matmul_rate
from hive_ds.training.parts import shares_of_step

BATCHES = 2
"""Different batches of one workload, taken in turn: their lengths differ."""
ROUNDS = 3
RESERVE = 0.12
"""Share of the time that is left over for an arm that has begun."""


@dataclass(frozen=True)
class Workload:
    """What one row trains on."""

    name: str
    batches: list[PackedBatch]
    is_larger: bool
    """Whether it needs more memory than the one before."""


@dataclass
class Run:
    """Rows so far, and the time that is left."""

    setting: Setting
    rate: float
    deadline: float
    out: Path | None
    result: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, on disk as well: what ends this process early does not take it along."""
        self.result["rows"].append(row)
        self.save()

    def skip(self, what: str, why: str) -> None:
        """Say what was left out."""
        print(f"skipped: {what}: {why}", flush=True)
        self.result["skipped"].append({"what": what, "why": why})
        self.save()

    def save(self) -> None:
        """Write the result so far."""
        if self.out:
            self.out.write_text(json.dumps(self.result) + "\n")


def workloads(size: Size, dtype: torch.dtype) -> list[Workload]:
    """Captions in micro-batches small to large, then texts of one length each."""
    made = []
    for index, count in enumerate(size.captions):
        batches = [make_batch(size, caption_lengths(size, count, seed), seed, dtype) for seed in range(BATCHES)]
        made.append(Workload(f"captions x {count}", batches, is_larger=index > 0))
    for length, count in size.lengths:
        batches = [make_batch(size, [length] * count, seed, dtype) for seed in range(BATCHES)]
        made.append(Workload(f"{length} tokens x {count}", batches, is_larger=False))
    return made


def time_arm(run: Run, name: str, loads: list[Workload]) -> None:
    """Build one arm, check it, and time it on every workload that there is time and memory for."""
    why = refusal(name)
    if why:
        run.skip(LABELS[name], why)
        return
    start = time.perf_counter()
    arm = build_arm(name, run.setting, loads[0].batches[0])
    print(f"{arm.label}: check {arm.check} ({time.perf_counter() - start:.0f} s)", flush=True)
    if arm.check != "passed":
        run.add({"arm": name, "label": arm.label, "workload": loads[0].name, "check": arm.check})
        return
    full = False
    budget = run.left() * 0.35
    begun = time.perf_counter()
    for load in loads:
        if run.left() < 10 or time.perf_counter() - begun > budget:
            run.skip(f"{arm.label}, {load.name}", "no time left for it")
            continue
        if full and load.is_larger:
            run.skip(f"{arm.label}, {load.name}", "out of memory at fewer samples")
            continue
        try:
            row = measure(run, arm, load)
        except torch.OutOfMemoryError:
            full = True
            run.skip(f"{arm.label}, {load.name}", "out of memory")
            _free(run.setting.device)
            continue
        run.add(row)
        print(
            f"  {load.name}: {row['seconds'] * 1e3:.4g} ms a step, {row['images_per_second']:.4g} images/s", flush=True
        )
    if hasattr(arm.stepper, "close"):
        arm.stepper.close()


def measure(run: Run, arm: Arm, load: Workload) -> dict[str, Any]:
    """One row: seconds of a step and what follows from them."""
    device = run.setting.device
    cuda = device.type == "cuda"
    for batch in load.batches:  # compiles what is compiled
        arm.stepper.step(batch)
    _wait(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(ROUNDS if cuda else 1):
        start = time.perf_counter()
        for batch in load.batches:
            arm.stepper.step(batch)
        _wait(device)
        times.append((time.perf_counter() - start) / len(load.batches))
    seconds = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    shares = shares_of_step(arm.model, lambda: arm.stepper.step(load.batches[0]), device)
    vision = run.setting.size.vision
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    count = sum(batch.num_images for batch in load.batches) / len(load.batches)
    tokens = sum(len(batch.input_ids) for batch in load.batches) / len(load.batches)
    flops = sum(arm.flops.count(work_of(batch, patches)) for batch in load.batches) / len(load.batches)
    return {
        "arm": arm.name,
        "label": arm.label,
        "workload": load.name,
        "check": arm.check,
        "micro_batch": count,
        "seconds": seconds,
        "spread": (max(times) - min(times)) / seconds,
        "images_per_second": count / seconds,
        "text_tokens_per_second": tokens / seconds,
        "flops": flops,
        "mfu": flops / seconds / run.rate,
        "peak_bytes": peak,
        "shares": shares,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Time a stage; 0 if every arm that ran passed its check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", type=int, choices=(1, 2, 3))
    parser.add_argument("--out", type=Path, help="JSON file, written after every row")
    parser.add_argument("--seconds", type=float, default=470.0, help="time for all of it")
    options = parser.parse_args(arguments)
    deadline = time.perf_counter() + options.seconds
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    setting = Setting(PAPER if cuda else TINY, options.stage, device, compiled=cuda)
    run = Run(setting, matmul_rate(device, setting.dtype), deadline, options.out)
    run.result = {
        "stage": options.stage,
        "tiny": not cuda,
        "models": setting.size.name,
        "precision": str(setting.dtype).removeprefix("torch."),
        "matmul_flops_per_second": run.rate,
        "versions": {name: _version(name) for name in ("transformers", "deepspeed", "liger-kernel")},
        "captions": CAPTIONS.name,
        "rows": [],
        "skipped": [],
    }
    loads = workloads(setting.size, setting.dtype)
    names = arm_names(setting)
    for index, name in enumerate(names):
        if run.left() < options.seconds * RESERVE:
            for late in names[index:]:
                run.skip(LABELS[late], "no time left for it")
            break
        try:
            time_arm(run, name, loads)
        except Exception as error:  # one way's failure is a red row, not the end of the others
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{LABELS[name]}: {failure}", flush=True)
            run.add({"arm": name, "label": LABELS[name], "workload": "all that is left", "check": failure})
        _free(device)
    run.save()
    print(table(run.result))
    return 0 if all(row["check"] == "passed" for row in run.result["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
