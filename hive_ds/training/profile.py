"""A profile of some training steps, by rank 0: a trace to look at, and a summary of where the time goes."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import profile, record_function
from tqdm import tqdm

from hive_ds.files import write_whole
from hive_ds.training.parts import ATTENTION, COMMUNICATION, own_time, shares_of, traced
from hive_ds.training.place import here

KINDS = ("matrix products", "attention", "elementwise, copies", "communication", "optimizer", "Python, waiting")
"""What a step's time is spent on. The last is what no operator accounts for, or the GPU's idle time."""
_OPERATOR = re.compile(r"(aten|hive_ds|c10d|nccl|gloo)\w*:")
"""On a CPU other events are Python code, or DeepSpeed's, that the trace names."""
_PRODUCT = re.compile(r"aten::(\w*mm|linear|\w*conv\w*)$")
STEP = "profiled step"
"""Mark around each step in the trace."""
_LONGEST = 40
"""Operators in the summary."""


@dataclass(frozen=True)
class StepProfile:
    """Steps to profile, and where the files go.

    Attributes:
        folder: ``RUN/stageN/profile``.
        first: optimizer step, from 1.
        last: the same; included.
        device: that the model is on.
    """

    folder: Path
    first: int
    last: int
    device: torch.device

    @classmethod
    def of(cls, steps: tuple[int, int] | None, folder: Path, device: torch.device) -> StepProfile | None:
        """What ``training.profile`` asks for; None where it is null."""
        return None if steps is None else cls(folder, *steps, device)

    def over(self, steps: range, model: Any) -> Iterator[int]:
        """``steps`` (from 0) one by one; files are written behind the last one that is profiled.

        Nothing of the training is touched. A run that ends before that step writes none.

        Args:
            steps: that are left to do.
            model: whose modules are told apart.
        """
        first = min(max(self.first - 1, steps.start), steps.stop)
        behind = min(max(self.last, first), steps.stop)
        if self.first > steps.stop:
            asked = f"training.profile is [{self.first}, {self.last}]"
            tqdm.write(f"warning: {asked}, but the last step is {steps.stop}: nothing is profiled")
        yield from range(steps.start, first)
        if first < behind:
            with traced(model, self.device) as trace:
                for step in range(first, behind):
                    with record_function(STEP):
                        yield step
            here.enter("profile", ())
            self.write(trace, first + 1, behind)
        yield from range(behind, steps.stop)

    def write(self, trace: profile, first: int, last: int) -> None:
        """Write the trace and the summary of these steps and print its head; a full disk costs them alone."""
        cuda = self.device.type == "cuda"
        events = list(trace.events())
        by = "self_device_time_total" if cuda else "self_cpu_time_total"
        head = _table(f"Steps {first} to {last}", kinds_of_work(events, cuda=cuda), shares_of(events, cuda=cuda))
        path = self.folder / f"steps-{first:06d}-{last:06d}"
        try:
            self.folder.mkdir(exist_ok=True)
            aside = self.folder / f".{path.name}.json.gz"
            trace.export_chrome_trace(str(aside))
            os.replace(aside, path.with_suffix(".json.gz"))
            longest = trace.key_averages().table(sort_by=by, row_limit=_LONGEST, max_name_column_width=60)
            write_whole(path.with_suffix(".txt"), f"{head}\n{longest}\n")
        except OSError as error:
            tqdm.write(f"warning: step {last}: no profile could be written ({error}), training goes on")
        tqdm.write(f"{head}{path}.txt, .json.gz for chrome://tracing or ui.perfetto.dev")


def kinds_of_work(events: list[Any], *, cuda: bool) -> dict[str, float]:
    """Share of each of `KINDS` in the profiled steps: of the GPU's time, or of the thread that runs the steps."""
    steps = [event for event in events if event.name == STEP and event.device_type == torch.autograd.DeviceType.CPU]
    spent = dict.fromkeys(KINDS, 0.0)
    for event in events:
        # Kernels of a GPU are work whoever starts them: Inductor's and Liger-Kernel's are no operator's.
        if cuda or (_OPERATOR.match(event.name) and event.thread == steps[0].thread):
            spent[_kind(event)] += own_time(event, cuda=cuda)
    if not cuda:
        spent["communication"] += _waited(events, steps[0].thread)
    whole = max(sum(step.time_range.elapsed_us() for step in steps), sum(spent.values()))
    spent["Python, waiting"] = whole - sum(spent.values())
    return {kind: round(value / whole, 4) for kind, value in spent.items()}


def _kind(event: Any) -> str:
    around = []
    while event is not None:
        around.append(event.name)
        event = event.cpu_parent
    if any(word in name for name in around for word in COMMUNICATION):
        return "communication"
    if "part:optimizer" in around:
        return "optimizer"
    if any(word in name for name in around for word in ATTENTION):
        return "attention"
    return "matrix products" if _PRODUCT.match(around[0]) else "elementwise, copies"


def _waited(events: list[Any], thread: int) -> float:
    """Microseconds in which gloo's threads sent while ``thread`` ran no operator."""
    sent = [_interval(event) for event in events if event.is_async and event.name.startswith(COMMUNICATION)]
    busy = [_interval(event) for event in events if event.thread == thread and _OPERATOR.match(event.name)]
    return _length(sent + busy) - _length(busy)


def _interval(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def _length(intervals: list[tuple[float, float]]) -> float:
    """Of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _table(title: str, kinds: dict[str, float], parts: dict[str, float]) -> str:
    table = Table(title=title, title_justify="left")
    for column in ("work", "share", "part", "share"):
        table.add_column(column, justify="right" if column == "share" else "left", no_wrap=True)
    rows = [[(name, f"{100 * share:.1f} %") for name, share in shares.items()] for shares in (kinds, parts)]
    for place in range(max(map(len, rows))):
        table.add_row(*(cell for column in rows for cell in (column[place] if place < len(column) else ("", ""))))
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue()
