"""HTML pages with nothing to fetch, readable on a phone and in the dark: style, tables, pictures inside the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #6b7280; --rule: #d9dde3; --good: #15803d;
  --bad: #b42318; --one: #2563eb; --two: #d97706; --three: #15803d; --four: #b42318; --five: #7c3aed; --six: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171b; --faint: #9aa3ae; --rule: #343a42;
  --good: #4ade80; --bad: #f87171; --one: #7aa8ff; --two: #fbbf24; --three: #4ade80; --four: #f87171;
  --five: #c4b5fd; --six: #67e8f9; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.headline { font-size: 1.15rem; } .faint { color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
tr.last td { font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; image-rendering: pixelated; display: block; border-radius: 4px; }
figcaption { font-size: .9rem; } .good { color: var(--good); } .bad { color: var(--bad); }
pre { overflow-x: auto; border: 1px solid var(--rule); border-radius: 4px; padding: .6rem; font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0; color: var(--faint); font-size: .85rem; }
.legend i { display: inline-block; margin-right: .35rem; vertical-align: middle; }
.legend .line { width: 1.2rem; height: .2rem; } .legend .dot { width: .6rem; height: .6rem; border-radius: 50%; }
.legend span { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 11px; }
"""


def document(title: str, sections: Sequence[str], style: str = "") -> str:
    """The page as HTML; ``sections`` are HTML, ``style`` comes after `STYLE`."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of text, the first row its head; rows named ``all`` or ``total`` stand out."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in body:
        mark = ' class="last"' if row[0] in ("all", "total") else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return '<div class="wide"><table>' + "".join(lines) + "</table></div>"


def picture(data: bytes, kind: str, alt: str) -> str:
    """An image whose file (``kind``: png, jpeg) lies inside the page."""
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
