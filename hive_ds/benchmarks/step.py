"""Time the training step of a stage: ``python -m hive_ds.benchmarks.step STAGE --out FILE``, for `make gpu-suite`.

On a GPU each way of training has a process of its own: they compile side by side and are timed in turn, alone on the
GPU. Without one all run in this process on tiny models, without torch.compile: that shows that it works, and times
nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hive_ds.benchmarks.arms import LABELS, Arm, Setting, arm_names, build_arm, refusal, work_of
from hive_ds.benchmarks.gpu import free, held_by_others, wait
from hive_ds.benchmarks.report import table
from hive_ds.benchmarks.side_by_side import time_side_by_side, turn_on_gpu
from hive_ds.benchmarks.sizes import CAPTIONS, PAPER, TINY, Size, caption_lengths, make_batch
from hive_ds.data.batch import PackedBatch
from hive_ds.files import write_whole
from hive_ds.launch.probe import version
from hive_ds.training.flops import matmul_rate
from hive_ds.training.parts import shares_of, slowest_kernels, traced

BATCHES = 2
"""Different batches of one workload, taken in turn: their lengths differ."""
ROUNDS = 3
"""At least so many, over all batches of a workload, and"""
SECONDS = 1.5
"""of steps that are timed, on a GPU."""
PROBES = (2, 3)
"""Captions of the batches on which an arm is checked and compiled; two numbers, so that neither becomes a constant."""
RESERVE = 0.12
"""Share of the time that is left over for an arm that has begun."""


@dataclass(frozen=True)
class Workload:
    """What one row trains on."""

    texts: str
    """"captions", or the length of all; a way is timed on larger and larger batches, until one does not fit."""
    batches: list[PackedBatch]

    @property
    def name(self) -> str:
        """As `load_names` has it."""
        return f"{self.texts} x {self.batches[0].num_images}"


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
            write_whole(self.out, json.dumps(self.result) + "\n")


def load_names(size: Size) -> list[str]:
    """Of what can be timed: captions, then texts of one length each; micro-batches small to large."""
    texts = [f"{length} tokens x {count}" for length, counts in size.lengths for count in counts]
    return [*(f"captions x {count}" for count in size.captions), *texts]


def workloads(size: Size, names: Iterable[str]) -> list[Workload]:
    """Those of `load_names` that are named, in that order."""
    made = []
    for texts, _, count in (name.rpartition(" x ") for name in names):
        if texts == "captions":
            lengths = [caption_lengths(size, int(count), seed) for seed in range(BATCHES)]
        else:
            lengths = [[int(texts.partition(" ")[0])] * int(count)] * BATCHES
        made.append(Workload(texts, [make_batch(size, one, seed) for seed, one in enumerate(lengths)]))
    return made


def time_arm(run: Run, name: str, loads: list[Workload], parts: int) -> None:
    """Build one arm, check it, and time it on every workload that there is time and memory for."""
    why = refusal(name)
    if why:
        run.skip(LABELS[name], why)
        return
    start = time.perf_counter()
    size = run.setting.size
    probes = [make_batch(size, caption_lengths(size, count, seed=9), 9) for count in PROBES]
    arm = build_arm(name, run.setting, probes)
    print(f"{arm.label}: check {arm.check} ({time.perf_counter() - start:.0f} s)", flush=True)
    if arm.check != "passed":
        run.add({"arm": name, "label": arm.label, "workload": loads[0].name, "check": arm.check})
        return
    arm.move("cpu")
    free(run.setting.device)
    run.result["ready"] = True
    run.save()
    gc.freeze()  # as a run does: what is there already is not looked through again
    parsers: list[Callable[[], None] | None] = []
    try:
        with turn_on_gpu(run.setting.device):
            run.rate = run.rate or matmul_rate(run.setting.device, run.setting.dtype)
            run.result["matmul_flops_per_second"] = run.rate
            arm.move(run.setting.device)
            for number, load in enumerate(loads):
                parsers.append(_time_workload(run, arm, load, with_trace=number < parts))
            arm.close()
            gc.unfreeze()
            free(run.setting.device)
    finally:
        for parse in filter(None, parsers):  # much Python, for which nobody must wait for the GPU
            parse()
            run.save()


def _time_workload(run: Run, arm: Arm, load: Workload, *, with_trace: bool) -> Callable[[], None] | None:
    """Add a row, or say why not; what fills in where the row's time goes."""
    if run.left() < 10:
        run.skip(f"{arm.label}, {load.name}", "no time left for it")
        return None
    if load.texts in arm.full:
        run.skip(f"{arm.label}, {load.name}", "out of memory at fewer samples")
        return None
    try:
        row, parse = measure(run, arm, load, with_trace=with_trace)
    except torch.OutOfMemoryError:
        arm.full.add(load.texts)
        others = held_by_others(run.setting.device) / 2**30
        run.skip(f"{arm.label}, {load.name}", f"out of memory; others held {others:.1f} GiB")
        arm.forget()
        free(run.setting.device)
        return None
    run.add(row)
    print(
        f"  {arm.label}, {load.name}: {row['seconds'] * 1e3:.4g} ms a step ({row['host_seconds'] * 1e3:.4g} ms of the "
        f"host), {row['images_per_second']:.4g} images/s",
        flush=True,
    )
    return parse


def measure(
    run: Run, arm: Arm, load: Workload, *, with_trace: bool
) -> tuple[dict[str, Any], Callable[[], None] | None]:
    """One row: seconds of a step and what follows from them; what fills in its parts, if they are traced."""
    device = run.setting.device
    cuda = device.type == "cuda"
    stepper = arm.stepper
    for batch in load.batches:  # compiles what is not compiled yet
        stepper.step(batch)
    wait(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < (ROUNDS if cuda else 1) or (cuda and sum(times) * len(load.batches) < SECONDS):
        start = time.perf_counter()
        for batch in load.batches:
            stepper.step(batch)
        wait(device)
        times.append((time.perf_counter() - start) / len(load.batches))
    seconds = statistics.median(times)
    start = time.perf_counter()
    stepper.step(load.batches[0])
    host = time.perf_counter() - start
    wait(device)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    trace = None
    if with_trace:
        with traced(arm.model, device) as trace:
            stepper.step(load.batches[0])
    vision = run.setting.size.vision
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    count = sum(batch.num_images for batch in load.batches) / len(load.batches)
    tokens = sum(len(batch.input_ids) for batch in load.batches) / len(load.batches)
    flops = sum(arm.flops.count(work_of(batch, patches)) for batch in load.batches) / len(load.batches)
    row: dict[str, Any] = {
        "arm": arm.name,
        "label": arm.label,
        "workload": load.name,
        "check": arm.check,
        "micro_batch": count,
        "seconds": seconds,
        "spread": (max(times) - min(times)) / seconds,
        "host_seconds": host,
        "images_per_second": count / seconds,
        "text_tokens_per_second": tokens / seconds,
        "flops": flops,
        "mfu": flops / seconds / run.rate,
        "peak_bytes": peak,
        "others_bytes": held_by_others(device) if cuda else None,
        "shares": {},
    }
    if trace is None:
        return row, None

    def parse() -> None:
        events = list(trace.events())
        row["shares"] = shares_of(events, cuda=cuda)
        if cuda:
            row["kernels"] = slowest_kernels(events)

    return row, parse


def time_here(run: Run, names: Sequence[str], options: argparse.Namespace) -> None:
    """One arm after the other in this process."""
    size = run.setting.size
    chosen = _chosen(options.loads or "", load_names(size), "--loads") or load_names(size)
    loads = workloads(size, chosen)
    whole = run.left()
    for index, name in enumerate(names):
        if run.left() < whole * RESERVE:
            for late in names[index:]:
                run.skip(LABELS[late], "no time left for it")
            break
        try:
            time_arm(run, name, loads, options.parts)
        except Exception as error:  # one way's failure is a red row, not the end of the others
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{LABELS[name]}: {failure}", flush=True)
            run.add({"arm": name, "label": LABELS[name], "workload": "all that is left", "check": failure})
        free(run.setting.device)


def _chosen(listed: str, known: Iterable[str], option: str) -> list[str]:
    """The names in a list with commas; ValueError for one that is not known."""
    names = [name for name in listed.split(",") if name]
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{option} names {name!r}; expected some of {', '.join(known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Time a stage; 0 if every arm that ran passed its check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", type=int, choices=(1, 2, 3))
    parser.add_argument("--out", type=Path, help="JSON file, written after every row")
    parser.add_argument("--seconds", type=float, default=470.0, help="time for all of it")
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    parser.add_argument("--arms", help=f"only these, with commas between: {', '.join(LABELS)}")
    parser.add_argument("--loads", help="only these workloads, with commas between, in this order")
    parser.add_argument("--parts", type=int, default=99, help="workloads of an arm whose time is told apart by part")
    options = parser.parse_args(arguments)
    # Whoever starts this process counts from before its imports, by a clock that is the machine's.
    deadline = min(options.until, time.perf_counter() + options.seconds)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    setting = Setting(PAPER if cuda else TINY, options.stage, device, compiled=cuda)
    try:
        names = _chosen(options.arms, LABELS, "--arms") if options.arms else arm_names(setting)
        _chosen(options.loads or "", load_names(setting.size), "--loads")
    except ValueError as error:
        parser.error(str(error))
    run = Run(setting, 0.0, deadline, options.out)
    run.result = {
        "stage": options.stage,
        "tiny": not cuda,
        "models": setting.size.name,
        "precision": str(setting.dtype).removeprefix("torch."),
        "matmul_flops_per_second": 0.0,
        "versions": {name: version(name) for name in ("transformers", "deepspeed", "liger-kernel")},
        "captions": CAPTIONS.name,
        "ready": False,
        "rows": [],
        "skipped": [],
    }
    if cuda and len(names) > 1:
        same = ["--parts", str(options.parts), *(["--loads", options.loads] if options.loads else [])]
        time_side_by_side(run, names, [str(options.stage), *same])
    else:
        time_here(run, names, options)
    run.save()
    if not (cuda and len(names) == 1):
        print(table(run.result))
    return 0 if all(row["check"] == "passed" for row in run.result["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
