"""What the doctor says of one thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    """What it belongs to: versions, machine, ..."""
    name: str
    status: Status
    said: str
    """What was found."""
    advice: str = ""
    """What to do about it; empty only where nothing is to be done."""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.advice, f"{self.name}: says nothing of what to do"


@dataclass(frozen=True)
class Diagnosis:
    """All findings of an examination."""

    findings: Sequence[Finding]
    seconds: float

    @property
    def counts(self) -> Counter[str]:
        """How many findings have each status."""
        return Counter(one.status for one in self.findings)

    @property
    def exit_code(self) -> int:
        """1 where there is a problem; warnings alone are 0."""
        return 1 if self.counts["problem"] else 0

    def summary(self) -> str:
        """One line."""
        counts = self.counts
        said = ", ".join(
            f"{counts[status]} {status}{'s' if counts[status] != 1 else ''}" for status in ("problem", "warning")
        )
        verdict = "not fit to train yet" if counts["problem"] else "fit to train"
        return f"{verdict}: {said}, {counts['ok']} ok, {self.seconds:.0f} s"

    def __str__(self) -> str:
        lines, area = [], ""
        for one in self.findings:
            if one.area != area:
                area = one.area
                lines.append(area)
            lines.append(f"  {one.status:<7}  {one.name}: {one.said}")
            if one.status != "ok":
                lines.append(f"           do: {one.advice}")
        return "\n".join([*lines, self.summary()])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "findings": [asdict(one) for one in self.findings],
            "counts": {status: self.counts[status] for status in ("ok", "warning", "problem")},
            "seconds": round(self.seconds, 1),
        }
