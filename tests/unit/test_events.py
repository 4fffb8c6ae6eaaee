"""Lines of a run that are read whatever stands between them; zeros are values, nulls are none."""

from __future__ import annotations

import json
from pathlib import Path

from hive_ds.events import of_kind, read_events, series, series_by_group

LINES = [
    {"event": "train", "step": 1, "loss": 2.5, "norms": {"vision": 1.0, "text": None}},
    {"event": "validation", "step": 1, "loss": 9.0},
    {"event": "train", "step": 2, "loss": None, "norms": None},
    {"event": "train", "step": 3, "loss": 0, "norms": {"vision": 0, "text": 3.0}},
    {"event": "train", "step": 4},
]


def test_what_is_no_line_of_a_run_is_left_out(tmp_path: Path) -> None:
    """As a kill or a full disk leaves it; what follows on a line of its own is read again."""
    file = tmp_path / "metrics.jsonl"
    assert read_events(file) == []
    good = [json.dumps(line).encode() for line in LINES]
    bad = [
        b'{"event": "tr',
        b"null",
        b"[1]",
        b'"event"',
        b'{"step": 1}',
        b"",
        b"\0\0",
        b"\xff\xfe",
        b'{"event": "\xff'[:-1],
    ]
    file.write_bytes(b"\n".join([*bad, good[0], *bad, *good[1:], *bad]))
    assert read_events(file) == LINES


def test_series_of_a_value() -> None:
    assert [line["step"] for line in of_kind(LINES, "train")] == [1, 2, 3, 4]
    assert series(LINES, "train", "loss") == [(1, 2.5), (3, 0)]
    assert series_by_group(LINES, "train", "norms") == {"vision": [(1, 1.0), (3, 0)], "text": [(3, 3.0)]}
    assert series(LINES, "stage", "loss") == []
