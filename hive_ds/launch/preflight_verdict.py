"""Which nodes stand out from the others, by what all of them have said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

CLOCK_SKEW = 5.0
"""Seconds: past it, file times and logs of nodes cannot be compared."""

SLOW_GPU = 0.7
SLOW_LINK = 0.2
"""Shares of the median below which something is broken; a busy link or a warm GPU is not."""


def compare_nodes(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Faults by node, for those that have any.

    Args:
        facts: node -> versions of `probe.versions`, ``skew`` of its clock to any one clock in seconds, and
            ``matmul_flops_per_second`` by GPU where it has some.
    """
    common = {
        name: Counter(one["versions"][name] for one in facts.values()).most_common(1)[0][0]
        for name in next(iter(facts.values()))["versions"]
    }
    time = median(one["skew"] for one in facts.values())
    rates = [rate for one in facts.values() for rate in one.get("matmul_flops_per_second", ())]
    faults: dict[str, list[str]] = {}
    for node, one in facts.items():
        found = [
            f"{name} is {version}, but {common[name]} on other nodes"
            for name, version in one["versions"].items()
            if version != common[name]
        ]
        if abs(one["skew"] - time) > CLOCK_SKEW:
            found.append(f"its clock is {one['skew'] - time:+.0f} s off the others'")
        found += [
            f"GPU {index} does {rate / 1e12:.0f} TFLOP/s; the median is {median(rates) / 1e12:.0f}"
            for index, rate in enumerate(one.get("matmul_flops_per_second", ()))
            if rate < SLOW_GPU * median(rates)
        ]
        if found:
            faults[node] = found
    return faults


def links(count: int) -> list[tuple[int, int, int]]:
    """The ring of ``count`` >= 2 nodes: (node, its neighbour, round), where no node is twice in a round."""
    if count == 2:
        return [(0, 1, 0)]
    last = [(count - 1, 0, 2 if count % 2 else 1)]
    return [(i, i + 1, i % 2) for i in range(count - 1)] + last


def judge_links(nodes: Sequence[str], rates: Sequence[float | None]) -> dict[str, str]:
    """Nodes that must not be kept, and why.

    A bad node spoils the links to both its neighbours, whose other links are good. Where one link alone is broken,
    either end would do, and the later one goes. A single slow link is no reason.

    Args:
        nodes: names.
        rates: of `links` (``len(nodes)``), bytes per second, None where nothing went through.
    """
    working = [rate for rate in rates if rate is not None]
    floor = SLOW_LINK * median(working) if working else 0.0
    ring = [(nodes[a], nodes[b], rate) for (a, b, _), rate in zip(links(len(nodes)), rates, strict=True)]
    faults = {}
    for node in nodes:
        own = {a if node == b else b: rate for a, b, rate in ring if node in (a, b)}
        if all(rate is None or rate < floor for rate in own.values()):
            said = " and ".join(f"{other} {_rate(rate)}" for other, rate in own.items())
            usual = f"; the median is {median(working) / 1e9:.2f} GB/s" if working else ""
            faults[node] = f"network: {said}{usual}"
    for a, b, rate in ring:
        if rate is None and a not in faults and b not in faults:
            faults[b] = f"network: {a} not reached, or does not reach it"
    return faults


def _rate(rate: float | None) -> str:
    return "not reached" if rate is None else f"at {rate / 1e9:.2f} GB/s"
