"""Figures of the quickstart's step on CPUs: page, words around them, result file, their keys in it, scale."""

from __future__ import annotations

from typing import Any

CPU_FIGURES: tuple[tuple[Any, ...], ...] = (
    (
        "docs/performance.md",
        r"([\d.]+) s before and ([\d.]+) s now in stage 1, ([\d.]+) s and ([\d.]+) s in stage 2, "
        r"([\d.]+) s and ([\d.]+) s",
        "docs/results/cpu_step.json",
        tuple(("fastest", version, stage) for stage in "123" for version in ("first", "now")),
    ),
    (
        "docs/performance.md",
        r"([\d.]+), ([\d.]+) and ([\d.]+) times as fast; under ZeRO-0 instead of ZeRO-3 "
        r"([\d.]+), ([\d.]+) and ([\d.]+)",
        "docs/results/cpu_step.json",
        tuple(("times_faster", form, stage) for form in ("now", "now under zero0") for stage in "123"),
    ),
    (
        "docs/performance.md",
        r"With AVX-512: ([\d.]+), ([\d.]+) and ([\d.]+) times",
        "docs/results/cpu_step_avx512.json",
        tuple(("times_faster", "now", stage) for stage in "123"),
    ),
    (
        "docs/performance.md",
        r"quickstart's stage 3 from (\d+) to (\d+) ms",
        "docs/results/profile_runs.json",
        (("rows", 0, "before", "seconds"), ("rows", 0, "after", "seconds")),
        1e3,
    ),
)
