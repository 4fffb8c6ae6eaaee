"""Reads a page as a browser would, and says what it would fetch."""

from __future__ import annotations

import html.parser


class Reader(html.parser.HTMLParser):
    """Collects tags and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        assert tag in ("line", "rect", "circle", "polyline")  # of an svg: they close themselves

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
