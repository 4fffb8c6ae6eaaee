"""Scoring of short answers: normalised exact match, shares with 95 % intervals."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ARTICLES = ("a", "an", "the")
_MARK = f"[{re.escape(string.punctuation)}]"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PUNCTUATION = re.compile(rf"(?!(?<=\d){_MARK}(?=\d)|(?<!\w)-(?=\.?\d)|(?<!\w)\.(?=\d)){_MARK}")
"""Every mark but those between two digits, and a minus sign or a decimal point that a number starts with."""
Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True)
class Share:
    """Right answers among all, with the Wilson 95 % interval (E. B. Wilson, 1927)."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """Share from 0 to 1; nan of nothing."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end, from 0 to 1."""
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.value
        centre = p + Z_95**2 / (2 * n)
        spread = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
        scale = 1 + Z_95**2 / n
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def normalise(answer: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces.

    Marks that belong to a number stay, but for the comma of thousands; so do articles where there is no other word, and
    an answer of marks alone: "+" is neither "-" nor silence.
    """
    words = _PUNCTUATION.sub("", _THOUSANDS.sub("", answer.lower())).split()
    return " ".join([word for word in words if word not in ARTICLES] or words or answer.split())


def exact_match(answer: str, truth: str) -> bool:
    """Whether both are the same once normalised."""
    return normalise(answer) == normalise(truth)


def accuracy(rows: Iterable[tuple[str, str]]) -> Share:
    """Share of (answer, truth) pairs that match."""
    matches = [exact_match(answer, truth) for answer, truth in rows]
    return Share(sum(matches), len(matches))


def accuracy_by_kind(kinds: Sequence[str], answers: Sequence[str], truths: Sequence[str]) -> dict[str, Share]:
    """Accuracy of every kind of question, in order of first appearance, then of all under ``"all"``."""
    rows = list(zip(kinds, answers, truths, strict=True))
    shares = {kind: accuracy((a, t) for k, a, t in rows if k == kind) for kind in dict.fromkeys(kinds)}
    return {**shares, "all": accuracy((a, t) for _, a, t in rows)}


def is_part(name: str) -> bool:
    """Whether a benchmark's score of this name is that of a part, of one of MME's categories, say."""
    return "." in name
