"""Figures of the pages that follow from result files of GPUs: (page, pattern, values)."""

from __future__ import annotations

import json
import re
from typing import Any

from reckoned import ROOT

RESULTS = ROOT / "kernels" / "benchmarks" / "results"
STEP = "docs/performance.md"
CAPTIONS, FEW, LONG = "captions x 96", "captions x 32", "2048 tokens x 8"
MIDDLE, SHORT = "512 tokens x 32", "32 tokens x 64"
ATTENTION = "attention of the LLM"
Row = tuple[str, str, tuple[float, ...]]


def read(name: str) -> dict[str, Any]:
    """A result file by the end of its name."""
    (path,) = RESULTS.glob(f"*-{name}.json")
    return json.loads(path.read_text())


def timed(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Its timed rows, by way and workload."""
    return {(row["arm"], row["workload"]): row for row in read(name)["rows"] if "seconds" in row}


def beside_sa(stage: int, workload: str) -> tuple[float, ...]:
    """A row of the table: ours, SA, how many times as fast, how many counted FLOPs allow."""
    rows = timed(f"7bfd46f20d-stage{stage}")
    ours, sa = rows["ours compiled", workload], rows["sa", workload]

    def cells(row: dict[str, Any]) -> tuple[float, float, float]:
        return 1e3 * row["seconds"], 100 * row["mfu"], row["peak_bytes"] / 2**30

    milliseconds, *rest = cells(ours)
    times = (sa["seconds"] / ours["seconds"], sa["flops"] / ours["flops"])
    return (milliseconds, ours["images_per_second"], *rest, *cells(sa), *times)


def of_allowed(stage: int, workload: str) -> float:
    """How much of the speed-up that FLOPs allow is there."""
    *_, times, allowed = beside_sa(stage, workload)
    return times / allowed


def rate_of(row: dict[str, Any]) -> float:
    """TFLOP/s of which a row's MFU is a share."""
    return float(row["flops"] / row["seconds"] / row["mfu"] / 1e12)


def shares_of_memory() -> tuple[float, float]:
    """Peak memory of stages 1 and 3 on captions, in percent of SA's."""
    ours_one, sa_one, ours_three, sa_three = (beside_sa(stage, CAPTIONS)[at] for stage in (1, 3) for at in (3, 6))
    return 100 * ours_one / sa_one, 100 * ours_three / sa_three


def gpu_figures() -> list[Row]:
    """All of them; ``#`` in a text is a figure."""
    found = [*_goals(), *_limits()]
    found += [
        (STEP, f"| {stage}, {load} | # | # | # % | # | # | # % | # | # | # |", beside_sa(stage, load))
        for stage in (3, 1)
        for load in (CAPTIONS, FEW, LONG, MIDDLE, SHORT)
    ]
    return [(page, _pattern(text), values) for page, text, values in found]


def _pattern(text: str) -> str:
    return re.escape(text).replace(r"\#", r"([\d.]+)").replace("ANY", ".*")


def _goals() -> list[Row]:
    """Of the first table, README and the kernel's page."""
    three, one, first = timed("7bfd46f20d-stage3"), timed("7bfd46f20d-stage1"), timed("d9202b8-stage3")
    best, best_one = three["ours compiled", CAPTIONS], one["ours compiled", CAPTIONS]
    paper = first["ours compiled", FEW]["seconds"] / first["paper", FEW]["seconds"]
    reached = (best, three["ours compiled", MIDDLE], best_one, three["ours compiled", SHORT])
    own, early = three["ours triton", CAPTIONS], first["ours compiled", LONG]
    return [
        (
            "README.md",
            "stage 1 # and stage 3 # times as fast as SA",
            (beside_sa(1, CAPTIONS)[-2], beside_sa(3, CAPTIONS)[-2]),
        ),
        (
            "docs/cost.md",
            "with 96 captions: stage 1 # and stage 3 # times as fast as SA, with # % and # % of its peak memory",
            (beside_sa(1, CAPTIONS)[-2], beside_sa(3, CAPTIONS)[-2], *shares_of_memory()),
        ),
        ("docs/kernel.md", "together # (128 captions) and # times (8 texts", gains_of_the_tile()),
        (STEP, "it was # times as *fast as ours*", (paper,)),
        (
            STEP,
            "stage 3 | partly | **reached** for 96 captions (#) and 512 tokens (#), **not** for 2048 tokens (#), 64 "
            "texts of 32 tokens (#), 32 captions (#)",
            tuple(of_allowed(3, load) for load in (CAPTIONS, MIDDLE, LONG, SHORT, FEW)),
        ),
        (
            STEP,
            "stage 1 | partly | **reached** for 96 captions (#), **not** for 512 (#), 2048 (#) and 32 tokens (#)",
            tuple(of_allowed(1, load) for load in (CAPTIONS, MIDDLE, LONG, SHORT)),
        ),
        (
            STEP,
            "with 96 captions (# %) and 512 tokens (# %); # % in stage 1; at most # % elsewhere",
            tuple(100 * row["mfu"] for row in reached),
        ),
        (STEP, "# % of the GPU's time in stage 3 with our kernel in every layer", (100 * own["shares"][ATTENTION],)),
        (STEP, "before the new tile, # % with 2048 tokens", (100 * early["shares"][ATTENTION],)),
        (
            STEP,
            "copy to the GPU is # % of the GPU's time in stage 3, **# % in stage 1**",
            (100 * best["shares"]["data"], 100 * best_one["shares"]["data"]),
        ),
    ]


def _limits() -> list[Row]:
    """Of what an H200 showed, its table aside."""
    three, one = timed("7bfd46f20d-stage3"), timed("7bfd46f20d-stage1")
    best, best_one = three["ours compiled", CAPTIONS], one["ours compiled", CAPTIONS]
    own = three["ours triton", CAPTIONS]
    rates = [read(f"7bfd46f20d-stage{stage}")["matmul_flops_per_second"] / 1e12 for stage in (3, 1)]
    few = (three["ours compiled", FEW], one["ours compiled", FEW])
    unsteady = one["sa", FEW]
    issued = [1e3 * row[key] for row in few for key in ("host_seconds", "seconds")]
    parts = [100 * best["shares"][part] for part in ("encoder", "LLM", ATTENTION, "projectors", "optimizer")]
    rest = 100 * (best["shares"]["data"] + best["shares"]["other"])
    took = [x for row in (best, best_one) for x in (row["kernels"]["all"], 1e3 * row["seconds"])]
    return [
        (STEP, "have the last process's, # and # TFLOP/s", tuple(rates)),
        (
            STEP,
            "SA's rounds differed by # %, and its # ms are more than it took in stage 3 (# ms)",
            (100 * unsteady["spread"], 1e3 * unsteady["seconds"], 1e3 * three["sa", FEW]["seconds"]),
        ),
        (
            STEP,
            "# and # TFLOP/s for ours in stages 1 and 3, # and # for SA",
            tuple(rate_of(rows[way, CAPTIONS]) for way in ("ours compiled", "sa") for rows in (one, three)),
        ),
        (
            STEP,
            "the memory in stage 1 on captions (# %) and not in stage 3 (# %)",
            shares_of_memory(),
        ),
        (STEP, "its kernels take # of # ms in stage 3, # of # ms in stage 1", tuple(took)),
        (STEP, "waited at the loss (# of # ms, # of # ms)", tuple(issued)),
        (
            STEP,
            "Of the # ms the encoder has # %, the LLM # %, attention of the LLM # % in our kernel ANY, projectors # %, "
            "optimizer # %, everything else # %",
            (best["kernels"]["all"], *parts, rest),
        ),
        (STEP, "the kernels take # ms and the step #:", (own["kernels"]["all"], 1e3 * own["seconds"])),
    ]


def gains_of_the_tile() -> tuple[float, ...]:
    """Time of forward and backward with the key gradient's old tile, over that with the new one."""
    tiles = [row for row in read("7bfd46f20d-tiles")["rows"] if row["way"] == "tile"]
    new = next(row for row in tiles if (row["kind"], row["tile"]) == ("keys", [64, 64, 4, 2]))
    return tuple(new[name]["base"][1] / new[name]["new"][1] for name in ("captions x 128", "2048 x 8"))
