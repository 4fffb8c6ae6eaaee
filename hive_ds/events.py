"""The lines of a stage's ``metrics.jsonl``, read. `hive_ds.training.metrics` says what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]
"""Step and value."""


def read_events(file: Path) -> list[dict[str, Any]]:
    """All lines; one that is no JSON object with an event (cut short or damaged) is left out. Without a file: []."""
    events = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def of_kind(events: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """The lines of one event."""
    return [event for event in events if event["event"] == kind]


def series(events: Iterable[Mapping[str, Any]], kind: str, key: str) -> Points:
    """(step, value) of every line of an event that has a finite ``key``."""
    return [(event["step"], event[key]) for event in of_kind(events, kind) if event.get(key) is not None]


def series_by_group(events: Iterable[Mapping[str, Any]], kind: str, key: str) -> dict[str, Points]:
    """The same of a ``key`` that holds a value for each of several groups."""
    found: dict[str, Points] = {}
    for event in of_kind(events, kind):
        for name, value in (event.get(key) or {}).items():
            if value is not None:
                found.setdefault(name, []).append((event["step"], value))
    return found
