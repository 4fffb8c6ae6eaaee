"""Line, bar and interval plots as inline SVG: no library, no script, any width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, SMALL, HEIGHT = 640, 400, 220
"""Of a plot's own units: a small one's text stays readable where two stand side by side, or one on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 34
COLOURS = ("var(--one)", "var(--two)", "var(--three)", "var(--four)", "var(--five)", "var(--six)")
"""Of `hive_ds.page`'s style, for light and dark, in the order in which lines take them."""


@dataclass(frozen=True)
class Line:
    """A named series of (x, y); with ``markers`` its points are dots, which no line joins."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    markers: bool = False

    @property
    def is_dots(self) -> bool:
        """Whether it is drawn as dots: a line of one point would not be seen."""
        return self.markers or len(self.points) == 1


def line_plot(lines: Sequence[Line], x_label: str, y_label: str, *, small: bool = False, from_zero: bool = True) -> str:
    """An SVG of all lines over shared axes; a sentence instead if there is no point.

    Args:
        lines: to draw, each with a name in the legend.
        x_label: below the plot.
        y_label: above it.
        small: narrower, with the legend below it, which has room for names of any length.
        from_zero: the y axis begins at 0, or below.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return "<p>No values were logged.</p>"
    width = SMALL if small else WIDTH
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    lowest = min(y for _, y in points)
    y_ticks = ticks(min(0.0, lowest) if from_zero else lowest, max(y for _, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (width - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        parts += _rule(at(x_ticks[0], tick)[1], tick, width)
    for tick in x_ticks:
        parts.append(_under(at(tick, y_ticks[0])[0], f"{tick:g}"))
    parts.append(f'<text x="{width - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text x="4" y="12">{escape(y_label)}</text>')
    for place, line in enumerate(lines):
        if not small:
            parts += _key(line, width - RIGHT - 90 * (len(lines) - place))
        parts += _draw(line, [at(*point) for point in line.points])
    return _svg(parts, y_label, width=width) + (legend(lines) if small else "")


def legend(lines: Sequence[Line]) -> str:
    """Names and colours of the lines that have a name, as HTML that wraps."""
    named = [line for line in lines if line.name]
    keys = (
        f'<span><i class="{"dot" if line.is_dots else "line"}" style="background:{line.colour}"></i>'
        f"{escape(line.name)}</span>"
        for line in named
    )
    return f'<p class="legend">{"".join(keys)}</p>' if named else ""


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """About ``most`` of the points: of more, the lowest and highest of each stretch, so that spikes stay."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // most)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def smoothed(points: Sequence[tuple[float, float]], window: int = 5) -> list[tuple[float, float]]:
    """Mean of each value and up to ``window`` - 1 before it."""
    values = [value for _, value in points]
    means = [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def bar_plot(counts: Sequence[int], labels: Sequence[str], x_label: str, *, between: bool) -> str:
    """An SVG of a histogram of one count at least, with about eight of ``labels`` below it.

    A label stands below each bar or, with ``between``, at the left end of each.
    """
    y_ticks = ticks(0, max(5, *counts))  # five at least: counts are whole, and so are then the ticks
    width = (WIDTH - LEFT - RIGHT) / len(counts)
    parts = []
    for tick in y_ticks:
        parts += _rule(HEIGHT - BOTTOM - tick / y_ticks[-1] * (HEIGHT - TOP - BOTTOM), tick, WIDTH)
    for place, count in enumerate(counts):
        height = count / y_ticks[-1] * (HEIGHT - TOP - BOTTOM)
        box = f'x="{LEFT + place * width:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" height="{height:.1f}"'
        parts.append(f'<rect {box} width="{max(width - 1, 1):.1f}" fill="var(--one)"/>')
    for place in range(0, len(labels), -(-len(labels) // 8)):
        anchor = "end" if place == len(counts) else "middle"  # the last would reach out of the picture
        parts.append(_under(LEFT + (place + 0.5 * (not between)) * width, escape(labels[place]), anchor))
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    return _svg(parts, x_label)


INTERVAL_COLOURS = {"above zero": "var(--one)", "below zero": "var(--two)", "holds zero": "var(--faint)"}


@dataclass(frozen=True)
class Interval:
    """A row of `interval_plot`."""

    name: str
    low: float
    middle: float
    high: float

    @property
    def colour(self) -> str:
        """By where it lies."""
        side = "holds zero" if self.low <= 0 <= self.high else "above zero" if self.middle > 0 else "below zero"
        return INTERVAL_COLOURS[side]


def interval_plot(groups: Mapping[str, Sequence[Interval]], x_label: str) -> str:
    """An SVG of one row at least, each a dot on its interval, and a legend: intervals that leave out zero are coloured.

    Args:
        groups: rows by what stands once beside them; a rule parts the groups.
        x_label: above the plot.
    """
    left, row_height, gap = 200, 20, 10
    rows = [row for group in groups.values() for row in group]
    x_ticks = ticks(min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows)), 8)
    bottom = TOP + len(rows) * row_height + len(groups) * gap

    def at(x: float) -> float:
        return left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - RIGHT - left)

    parts = []
    for tick in x_ticks:
        x, colour = at(tick), "var(--faint)" if tick == 0 else "var(--rule)"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="{colour}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>')
    top = float(TOP)
    for name, group in groups.items():
        parts.append(f'<line x1="0" x2="{WIDTH}" y1="{top:.1f}" y2="{top:.1f}" stroke="var(--rule)"/>')
        parts.append(f'<text x="4" y="{top + gap / 2 + 14:.1f}" font-weight="600">{escape(name)}</text>')
        for place, row in enumerate(group):
            y = top + gap / 2 + (place + 0.5) * row_height
            ends = f'x1="{at(row.low):.1f}" x2="{at(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(row.name)}</text>')
            parts.append(f'<line {ends} stroke="{row.colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{at(row.middle):.1f}" cy="{y:.1f}" r="4" fill="{row.colour}"/>')
        top += len(group) * row_height + gap
    parts.append(f'<text x="4" y="12">{escape(x_label)}</text>')
    keys = [Line(f"interval {words}", colour, [], markers=True) for words, colour in INTERVAL_COLOURS.items()]
    return _svg(parts, x_label, height=bottom + 22) + legend(keys)


def short(value: float) -> str:
    """``value`` in four digits: 950, 12.3k, 45.6M."""
    for limit, divisor, letter in ((1e7, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.4g}{letter}"
    return f"{value:.4g}"


def _rule(y: float, tick: float, width: int) -> list[str]:
    line = f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>'
    return [line, f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>']


def _under(x: float, label: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{label}</text>'


def _svg(parts: Sequence[str], label: str, *, width: float = WIDTH, height: float = HEIGHT) -> str:
    box = f'viewBox="0 0 {width} {height}"'
    return f'<svg {box} role="img" aria-label="{escape(label)}">' + "".join(parts) + "</svg>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from at most ``low`` to at least ``high``, two or more."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def _key(line: Line, x: float) -> list[str]:
    drawn = f'<rect x="{x - 4}" y="7" width="14" height="2" fill="{line.colour}"/>'
    if line.is_dots:
        drawn = f'<circle cx="{x + 4}" cy="8" r="4" fill="{line.colour}"/>'
    return [drawn, f'<text x="{x + 14}" y="12">{escape(line.name)}</text>']


def _draw(line: Line, points: Sequence[tuple[float, float]]) -> list[str]:
    if line.is_dots:
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{line.colour}"/>' for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"/>']
