"""What was found wrong: named up to a limit, counted beyond it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

NAMED = 20
"""Findings of one kind that are named; more are only counted."""

KINDS = {
    "index": "index.json does not describe the folder",
    "file": "shard files missing, or not of the listed size or hash",
    "sample": "samples that cannot be read, or make no sense",
    "image": "images that cannot be decoded",
    "id": "odd ids (spaces at an end, or characters that cannot be printed)",
    "sizes": "rows of sizes.npy that are not the sample's",
}
"""Kinds of finding, in the order of the report, and what each means."""


@dataclass(frozen=True)
class Finding:
    """One fault: the sample's id or number (empty for a whole file), the shard, and the reason."""

    sample: str
    shard: str
    reason: str

    def __str__(self) -> str:
        place = f"sample {self.sample}, shard {self.shard}" if self.sample else self.shard
        return f"{place}: {self.reason}"


@dataclass
class Findings:
    """Findings by kind: the first NAMED of each, and how many there were."""

    named: dict[str, list[Finding]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, finding: Finding) -> None:
        """Count ``finding``, and keep it if it is among the first."""
        self._extend(kind, [finding], 1)

    def merge(self, other: Findings) -> None:
        """Append what was found in a later part of the folder."""
        for kind, count in other.counts.items():
            self._extend(kind, other.named[kind], count)

    def _extend(self, kind: str, findings: Iterable[Finding], count: int) -> None:
        named = self.named.setdefault(kind, [])
        named.extend(list(findings)[: NAMED - len(named)])
        self.counts[kind] = self.counts.get(kind, 0) + count

    def lines(self) -> list[str]:
        """The report: a headline for each kind that was found, and its findings below."""
        lines = []
        for kind, meaning in KINDS.items():
            if kind not in self.counts:
                continue
            named, count = self.named[kind], self.counts[kind]
            lines.append(f"FAULT {kind}: {meaning} ({count})")
            lines += [f"  {finding}" for finding in named]
            lines += [f"  and {count - len(named)} more"] * (count > len(named))
        return lines
