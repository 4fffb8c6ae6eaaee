"""Pictures as SVG text: few shapes, fixed colours on white, the same bytes every time."""

from __future__ import annotations

from html import escape

INK, FAINT, RULE = "#1b1f24", "#6b7280", "#d9dde3"
VISION, BRIDGE, LANGUAGE, LOSS = "#2563eb", "#7c3aed", "#d97706", "#b42318"
"""Colours of encoder, projectors, LLM and gradient, in every picture."""


class Drawing:
    """Shapes that are collected, then written; the origin is at the top left, units are pixels."""

    def __init__(self, width: int, height: int, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, *, fill: str, line: str, opacity: float = 1) -> None:
        """A rectangle with slightly round corners."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{line}"/>'
        )

    def text(self, x: float, y: float, text: str, *, colour: str = INK, anchor: str = "start", size: int = 12) -> None:
        """One line of text; ``y`` is its base line."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
        )

    def line(self, *points: tuple[float, float], colour: str = INK, arrow: bool = False, width: float = 1.5) -> None:
        """Straight pieces from point to point, with an arrow's head at the end if asked for."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>')
        if arrow:
            self._head(points[-2], points[-1], colour)

    def dot(self, x: float, y: float, radius: float, colour: str, *, hollow: bool = False) -> None:
        """A circle, full or with white in it."""
        fill = "#ffffff" if hollow else colour
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}" stroke="{colour}"/>')

    def _head(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        run, rise = end[0] - start[0], end[1] - start[1]
        length = (run**2 + rise**2) ** 0.5
        along, across = (run / length, rise / length), (-rise / length, run / length)
        corners = [end] + [
            (end[0] - 7 * along[0] + side * across[0], end[1] - 7 * along[1] + side * across[1]) for side in (3.5, -3.5)
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        self._parts.append(f'<polygon points="{points}" fill="{colour}"/>')

    def render(self) -> str:
        """The file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'width="{self.width}" height="{self.height}" font-family="system-ui, sans-serif" '
            f'aria-label="{escape(self.label)}">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        )
        return head + "\n".join(self._parts) + "\n</svg>\n"
