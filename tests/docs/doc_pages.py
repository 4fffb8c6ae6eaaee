"""The pages that people read, and what is in them: code blocks, code in sentences, headings, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Block:
    """A code block: its language (empty for an indented one), its text, and the line that it begins at."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """``page:line``, for messages."""
        return f"{self.page}:{self.line}"


def page_names() -> list[str]:
    """README, CONTRIBUTING, and every page of docs/ and ds_configs/."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    paths += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "ds_configs").glob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in paths]


@cache
def read(page: str) -> str:
    """The page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks(page: str) -> list[Block]:
    """Fenced and indented code blocks, in order."""
    found: list[Block] = []
    lines = read(page).splitlines()
    start = 0
    while start < len(lines):
        end = start
        if fence := re.match(r"```(\w*)$", lines[start]):
            end = lines.index("```", start + 1)
            found.append(Block(page, start + 1, fence[1] or "text", "\n".join(lines[start + 1 : end])))
        elif _begins_indented(lines, start):
            end = start
            while end + 1 < len(lines) and (lines[end + 1].startswith("    ") or not lines[end + 1].strip()):
                end += 1
            found.append(Block(page, start + 1, "", "\n".join(line[4:] for line in lines[start : end + 1]).rstrip()))
        start = end + 1
    return found


def _begins_indented(lines: list[str], place: int) -> bool:
    before = lines[place - 1] if place else ""
    return lines[place].startswith("    ") and not before.strip()


@cache
def prose(page: str) -> str:
    """The page without its code blocks; every line stays where it was."""
    lines = read(page).splitlines()
    for block in blocks(page):
        last = block.line + block.text.count("\n") + (2 if block.language else 0)
        lines[block.line - 1 : last] = [""] * (last - block.line + 1)
    return "\n".join(lines)


def code_spans(page: str) -> Iterator[str]:
    """What stands between backquotes in sentences and tables."""
    for match in re.finditer(r"(`+)(.+?)\1(?!`)", prose(page)):
        yield match[2].strip().replace("\\|", "|")


def links(page: str) -> Iterator[str]:
    """Targets of links and pictures."""
    text = re.sub(r"(`+)(.+?)\1(?!`)", "", prose(page))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r'src="([^"]+)"', text)


@cache
def anchors(page: str) -> set[str]:
    """Names that links into the page may have, as GitHub makes them of its headings."""
    headings = re.findall(r"^#{1,6} (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", _plain(heading).lower()).replace(" ", "-") for heading in headings}


def _plain(heading: str) -> str:
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("&lt;", "<")
