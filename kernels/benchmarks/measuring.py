"""One shape measured: every peer checked, then the green ones timed against each other."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from functools import cached_property

import torch

from .case import Case
from .checking import Check
from .peer import Peer
from .peers import PEERS
from .records import Record
from .shapes import Shape
from .timing import Clock, clock, interleaved, peak_bytes, spread, told

SECONDS = 1.5
"""Time for the readings of one direction of one shape on a GPU; on a CPU one reading is enough to see it work."""


class Measurement:
    """Checks and times of one shape, each made when first asked for and kept."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.case = Case(shape, device, dtype)
        self._peers: dict[str, Peer] = {}
        self._verdicts: dict[str, str] = {}
        self._rows: dict[str, dict[str, Record]] = {}

    @cached_property
    def _check(self) -> Check:
        return Check(self.case)

    def peer(self, name: str) -> Peer:
        """The peer made for this case."""
        if name not in self._peers:
            self._peers[name] = PEERS[name](self.case)
        return self._peers[name]

    def verdict(self, name: str) -> str:
        """ "passed", or why the peer does not agree with the reference."""
        if name not in self._verdicts:
            try:
                self._check.assert_agrees(self.peer(name))
                self._verdicts[name] = "passed"
            except Exception as error:  # one peer that a library refuses must not hide the others
                self._verdicts[name] = told(error)
        return self._verdicts[name]

    def row(self, name: str, direction: str) -> Record:
        """Times of a peer; without "seconds" if it is red or cannot be timed, and "note" says why."""
        if direction not in self._rows:
            self._rows[direction] = self._time(direction)
        return self._rows[direction][name]

    def summary(self) -> Record:
        """The shape and the work it needs."""
        shape = self.case.shape
        work = {direction: asdict(shape.work(direction, self.case.dtype)) for direction in shape.directions}
        return asdict(shape) | {"pairs": shape.pairs, "dtype": str(self.case.dtype), "work": work}

    def _time(self, direction: str) -> dict[str, Record]:
        rows = {name: self._blank(name, direction) for name in PEERS}
        clocks, notes = {}, {}
        for name, row in rows.items():
            if row["check"] != "passed" or row["note"]:
                continue
            try:
                clocks[name], notes[name] = clock(self.peer(name), direction)
                row["peak_bytes"] = peak_bytes(self.peer(name), direction)
            except RuntimeError as error:  # out of memory, most likely
                clocks.pop(name, None)
                row["note"] = told(error)
        for name, readings in self._readings(clocks).items():
            rows[name] |= {
                "seconds": statistics.median(readings),
                "spread": spread(readings),
                "readings": len(readings),
                "graphed": clocks[name].graphed,
                "note": notes[name],
            }
        return rows

    def _readings(self, clocks: dict[str, Clock]) -> dict[str, list[float]]:
        if self.case.device.type == "cuda":
            return interleaved(clocks, seconds=SECONDS)
        return interleaved(clocks, seconds=0, least=1)

    def _blank(self, name: str, direction: str) -> Record:
        check = self.verdict(name)
        row: Record = {"shape": self.case.shape.name, "direction": direction, "peer": name, "check": check}
        passed = check == "passed"
        return row | {
            "label": PEERS[name].label,
            "detail": self.peer(name).detail if passed else "",
            "note": (self.peer(name).refuses(direction) or "") if passed else "",
        }
