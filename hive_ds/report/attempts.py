"""Attempts at each stage and how they ended, and what went wrong on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hive_ds.constants import EXIT_HUNG, EXIT_STOPPED, SLOW_RATIO
from hive_ds.events import of_kind
from hive_ds.report.run import RunRecord, StageRecord
from hive_ds.report.tables import Rows, when

ENDINGS = {0: "done", 1: "failed", 2: "wrong input", EXIT_STOPPED: "stopped as asked", EXIT_HUNG: "hung"}
"""Exit codes of a rank and of a launcher, in words."""
_NAMED = 5
_OFTEN = 0.1
"""Share of the log lines from which a slow rank is worth a warning."""


def attempt_rows(runs: Sequence[RunRecord]) -> Rows:
    """Every attempt that trained, and those that job scripts record."""
    rows = [row for run in runs for stage in run.stages for row in _attempts(run, stage)]
    return [["run", "stage", "began", "from step", "devices", "hosts", "ended"], *rows] if rows else []


def _attempts(run: RunRecord, stage: StageRecord) -> Iterator[list[str]]:
    begins = [place for place, event in enumerate(stage.events) if event["event"] == "start"]
    for place, following in zip(begins, [*begins[1:], len(stage.events)], strict=False):
        start, ended = stage.events[place], _ended(stage, stage.events[place:following], stage.events[following:])
        devices = f"{start['ranks']} x {start['device']}"
        hosts = ", ".join(start["hosts"])
        yield [run.name, str(stage.number), when(start["time"]), f"{start['step']:,}", devices, hosts, ended]
    for folder in sorted(stage.folder.glob("attempts/*/")):
        yield [run.name, str(stage.number), f"job {folder.name}", "", "", "", _exit_codes(folder)]


def _ended(stage: StageRecord, own: Sequence[Mapping[str, Any]], later: Sequence[Mapping[str, Any]]) -> str:
    stopped = bool(of_kind(own, "stop"))
    if later:
        return f"{'stopped as asked' if stopped else 'broken off'}; the next one went on from step {later[0]['step']:,}"
    if stage.done:
        return "done"
    last, step = when(own[-1]["time"]), f"step {own[-1]['step']:,}"
    asked = "; STOP is there" if (stage.folder / "STOP").exists() else ""
    return f"stopped as asked at {step}{asked}" if stopped else f"no end recorded; last heard of {last}, {step}{asked}"


def _exit_codes(attempt: Path) -> str:
    codes = {file.stem: file.read_text().strip() for file in sorted(attempt.glob("*.code"))}
    if not codes:
        return "no exit code: running, or its nodes were ended by srun"
    by_ending: dict[str, list[str]] = {}
    for node, code in codes.items():
        by_ending.setdefault(_ending(code), []).append(node)
    return "; ".join(f"{ending}: {', '.join(nodes)}" for ending, nodes in by_ending.items())


def _ending(code: str) -> str:
    if not code.isdecimal():
        return f"exit code {code}"
    number = int(code)
    if number in ENDINGS:
        return ENDINGS[number]
    return f"killed by signal {number - 128}" if number > 128 else f"exit code {number}"


def warnings(runs: Sequence[RunRecord]) -> list[str]:
    """One sentence for each sort of thing that went wrong in a stage."""
    found = []
    for run in runs:
        for stage in run.stages:
            place = f"{run.name}, stage {stage.number}: " if len(runs) > 1 else f"stage {stage.number}: "
            found += [f"{place}{said}" for said in _stage_warnings(stage)]
    return found


def _stage_warnings(stage: StageRecord) -> Iterator[str]:
    yield from _skips(of_kind(stage.events, "skipped_step"))
    yield from _bad_samples(stage, of_kind(stage.events, "bad_samples"))
    lines = of_kind(stage.events, "train")
    unknown = [line["step"] for line in lines if line.get("loss") is None]
    if unknown:
        yield f"the loss was not finite at {_steps(unknown)}"
    slow = [line for line in lines if line["slowest_ratio"] >= SLOW_RATIO]
    for (rank, by), count in Counter((line["slowest_rank"], line["slowest_by"]) for line in slow).most_common(_NAMED):
        if count >= _OFTEN * len(lines):
            yield f"rank {rank} held the others up ({by}, {SLOW_RATIO:g} times or more), {count} of {len(lines)} lines"
    for event in of_kind(stage.events, "checkpoint"):
        if event.get("failed"):
            yield f"no checkpoint could be written at step {event['step']}: {event['failed']}"
    for file in sorted(stage.folder.glob("hang*/verdict.txt")):
        yield f"a hang ({file.parent.name}): {file.read_text().strip()}"
    if cut := stage.last.get("cut_samples"):
        yield f"{cut:,.0f} samples were longer than data.max_length and cut"


def _skips(events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if events:
        samples = [sample for rank in events[-1].get("sample_ids", ()) for sample in rank]
        named = ", ".join(map(str, samples[:_NAMED])) + (" ..." if len(samples) > _NAMED else "")
        yield f"skipped {_steps([one['step'] for one in events])}; samples of the last: {named}"


def _bad_samples(stage: StageRecord, events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    bad = [sample for event in events for sample in event["samples"]]
    if bad:
        named = "; ".join(f"{one['id']}: {one['reason']}" for one in bad[:_NAMED])
        share = 100 * len(bad) / max(stage.last.get("samples", 0), 1)
        yield f"unreadable samples replaced by others: {len(bad)} ({share:.2g} %), the first of them {named}"


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:_NAMED]))
    return f"step{'s' if len(steps) > 1 else ''} {shown}" + (f" and {len(steps) - _NAMED} more" * (len(steps) > _NAMED))
