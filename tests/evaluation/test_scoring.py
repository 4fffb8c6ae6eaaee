"""Scoring: golden cases, and intervals against their defining equation."""

from __future__ import annotations

import math

import pytest

from hive_ds.evaluation.scoring import Share, accuracy_by_kind, exact_match, normalise


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("red", "red", True),
        ("Red.", "red", True),
        ("  a red\n circle ", "the RED circle!", True),
        ("red circle", "red", False),
        ("", "red", False),
        ("", "the", False),
        ("", "A", False),
        ("The", "A", False),
        ("(a)", "A", True),
        ("10", "1", False),
        ("3.5", "35", False),
        (".5", "5", False),
        ("It is 3.5.", "it is 3.5", True),
        ("-1", "1", False),
        ("(-1)", "-1", True),
        ("10:30", "1030", False),
        ("1,000", "1000", True),
        ("1,5", "15", False),
        ("$5", "5", True),
        ("don't", "dont", True),
        ("U.S.", "us", True),
        ("ox", "o x", False),
        ("an", "ant", False),
        ("", "+", False),
        ("-", "+", False),
        (" + ", "+", True),
    ],
)
def test_exact_match(answer: str, truth: str, same: bool) -> None:
    assert exact_match(answer, truth) is same


def test_normalise_keeps_words_apart() -> None:
    assert normalise("The cat, a dog;  AND an owl?") == "cat dog and owl"


def test_wilson_interval() -> None:
    """Its ends p solve |p - right/n| = z sqrt(p (1 - p) / n); 0 and 1 have no such end on their side."""
    for right, total in [(1, 10), (50, 100), (9, 10), (237, 600)]:
        share = Share(right, total)
        low, high = share.interval
        for end in (low, high):
            assert abs(end - share.value) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / total), rel=1e-6)
        assert low < share.value < high
    assert Share(0, 20).interval[0] == pytest.approx(0, abs=1e-12)
    assert Share(20, 20).interval[1] == pytest.approx(1)
    assert Share(0, 20).interval[1] == pytest.approx(0.1611, abs=1e-4)
    assert Share(0, 0).interval == (0, 1)
    assert math.isnan(Share(0, 0).value)


def test_accuracy_by_kind() -> None:
    shares = accuracy_by_kind(
        ["colour", "count", "colour", "count", "count"], ["Red", "2", "blue", "3", ""], ["red", "2", "green", "3", "1"]
    )
    assert list(shares) == ["colour", "count", "all"]
    assert shares == {"colour": Share(1, 2), "count": Share(2, 3), "all": Share(3, 5)}
