"""What the doctor says of one thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hive_ds.stages import VLM_STAGES

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
    stages: tuple[str, ...] = ()
    """Names of the stages that it is for; empty: all."""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.advice, f"{self.name}: says nothing of what to do"


@dataclass(frozen=True)
class Diagnosis:
    """All findings of an examination."""

    findings: Sequence[Finding]
    seconds: float
    stages: tuple[str, ...] = ()
    """Names of the recipe's stages."""

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
        verdict = (self._way_out() or "not fit to train yet") if counts["problem"] else "fit to train"
        return f"{verdict}: {said}, {counts['ok']} ok, {self.seconds:.0f} s"

    def _way_out(self) -> str:
        """Where the problems are those of stages 4 and 5 alone: how to train the others."""
        problems = [one for one in self.findings if one.status == "problem"]
        named = {stage for one in problems for stage in one.stages}
        first = next((place for place, stage in enumerate(self.stages) if stage in named), 0)
        left_out = [stage for stage in VLM_STAGES if stage.name in self.stages[first:]]  # 5 starts from 4
        if not first or not all(one.stages for one in problems) or len(left_out) < len(self.stages[first:]):
            return ""
        numbers = " and ".join(str(stage.number) for stage in left_out)
        which, them = ("stages", "them") if len(left_out) > 1 else ("stage", "it")
        options = " ".join(f"--set stages.{stage.name}=null" for stage in left_out)
        return f"{which} {numbers} cannot start; leave {them} out with {options}, all else is fit to train"

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
