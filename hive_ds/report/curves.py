"""Curves of a stage: of one run with its parts, or of several runs over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from hive_ds.events import Points, series, series_by_group
from hive_ds.plots import COLOURS, Line, line_plot, smoothed, thinned
from hive_ds.report.run import RunRecord, StageRecord

MOST_LINES = len(COLOURS)
SMOOTH_SHARE = 50
"""A training loss is averaged over this part of its points: 20 of a thousand."""


@dataclass(frozen=True)
class Plot:
    """A plot of one key of ``train`` lines."""

    title: str
    key: str
    factor: float = 1.0
    from_zero: bool = True


LOSS = Plot("training loss, nats per token", "loss", from_zero=False)
PLOTS = (
    Plot("text tokens per second and device", "tokens_per_second_per_gpu"),
    Plot("images per second and device", "images_per_second_per_gpu"),
    Plot("waiting for data, % of the time", "data_wait_share", 100.0),
    Plot("MFU, % of the measured matrix rate", "mfu", 100.0),
)
HELD_OUT = {"loss": "held out", "text_loss": "text alone"}


def stage_curves(runs: Sequence[RunRecord], number: int) -> str:
    """All plots of a stage, as HTML; a sentence where no run logged anything."""
    found = [(run.name, stage) for run in runs if (stage := run.stage(number)) is not None and stage.last]
    if not found:
        return "<p>Nothing was logged.</p>"
    colours = {run.name: COLOURS[place % MOST_LINES] for place, run in enumerate(runs)}
    plots = _single(found[0][1]) if len(runs) == 1 else _compared(found, colours)
    return f'<div class="plots">{"".join(plots)}</div>'


def _single(stage: StageRecord) -> list[str]:
    events = stage.events
    losses = {"training": _smooth(series(events, "train", "loss"))}
    dots = {label: series(events, "validation", key) for key, label in HELD_OUT.items()}
    lines = [*_lines(losses), *_lines(dots, first=1, markers=True)]
    rates = _merged(series_by_group(events, "train", "lr"))
    norms = _merged(series_by_group(events, "train", "grad_norms"))
    plots = [
        _figure("loss, nats per token", lines, from_zero=False),
        _figure("learning rate", _lines(rates)),
        _figure("gradient norm before clipping", _lines(norms)),
    ]
    if answers := series(events, "answers", "share"):
        plots.append(_figure("questions answered, %", _lines({"": _scaled(answers, 100)}, markers=True)))
    return plots + [
        _figure(plot.title, _lines({"": _scaled(series(events, "train", plot.key), plot.factor)})) for plot in PLOTS
    ]


def _compared(found: Sequence[tuple[str, StageRecord]], colours: dict[str, str]) -> list[str]:
    def figure(plot: Plot, get: Callable[[StageRecord], Points], *, markers: bool = False) -> str:
        values = {name: _scaled(get(stage), plot.factor) for name, stage in found}
        lines = [Line(name, colours[name], thinned(points), markers) for name, points in values.items() if points]
        return _figure(plot.title, lines, from_zero=plot.from_zero)

    def highest_rate(stage: StageRecord) -> Points:
        rates: dict[float, float] = {}
        for points in series_by_group(stage.events, "train", "lr").values():
            for step, rate in points:
                rates[step] = max(rate, rates.get(step, 0.0))
        return sorted(rates.items())

    plots = [figure(LOSS, lambda stage: _smooth(series(stage.events, "train", LOSS.key)))]
    for key, label in HELD_OUT.items():
        if any(len(series(stage.events, "validation", key)) > 1 for _, stage in found):  # one alone: the table has it
            title = f"loss, {label}"
            one = Plot(title, key, from_zero=False)
            plots.append(figure(one, _reader("validation", key), markers=True))
    plots.append(figure(Plot("learning rate, highest of the groups", "lr"), highest_rate))
    for plot in (Plot("gradient norm before clipping", "grad_norm"), *PLOTS):
        plots.append(figure(plot, _reader("train", plot.key)))
    return plots


def _reader(kind: str, key: str) -> Callable[[StageRecord], Points]:
    return lambda stage: series(stage.events, kind, key)


def _figure(title: str, lines: Sequence[Line], *, from_zero: bool = True) -> str:
    shown = [line for line in lines[:MOST_LINES] if line.points]
    more = len(lines) - MOST_LINES
    note = f'<p class="faint">lines not drawn: {more}</p>' if more > 0 else ""
    if not shown:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>No values were logged.</p></figure>"
    return f"<figure>{line_plot(shown, 'step', title, small=True, from_zero=from_zero)}{note}</figure>"


def _lines(named: dict[str, Points], *, first: int = 0, markers: bool = False) -> list[Line]:
    colours = [COLOURS[(first + place) % MOST_LINES] for place in range(len(named))]
    return [
        Line(name, colour, thinned(points), markers)
        for (name, points), colour in zip(named.items(), colours, strict=True)
        if points
    ]


def _merged(groups: dict[str, Points]) -> dict[str, Points]:
    """Groups that have the same values as one line, under the names of all."""
    names: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, points in groups.items():
        names.setdefault(tuple(points), []).append(name)
    return {
        ", ".join(same) if len(same) <= 2 else f"{same[0]} and {len(same) - 1} more": list(points)
        for points, same in names.items()
    }


def _scaled(points: Points, factor: float) -> Points:
    return [(step, factor * value) for step, value in points]


def _smooth(points: Points) -> Points:
    return smoothed(points, max(1, len(points) // SMOOTH_SHARE))
