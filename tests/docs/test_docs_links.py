"""Links, pictures, and files that are named: all there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import ROOT, anchors, code_spans, links, page_names, read

HISTORY = ("CHANGELOG.md", "docs/lab_log.md")
TRACKED = re.compile(r"(docs|hive_ds|kernels|slurm|tests|ds_configs)/[\w./*-]+")
"""A path in the repository, as a code span may name it."""


@pytest.mark.parametrize("page", page_names())
def test_links_lead_somewhere(page: str):
    lost = []
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        there = target.exists()
        if not there or (anchor and anchor not in anchors(str(target.resolve().relative_to(ROOT)))):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", [page for page in page_names() if page not in HISTORY])
def test_named_files_are_there(page: str):
    names = [span.partition("::")[0] for span in code_spans(page) if TRACKED.fullmatch(span.partition("::")[0])]
    assert [name for name in names if not list(ROOT.glob(name.rstrip("/")))] == []


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [link.partition("#")[0] for link in links(page) if not re.match(r"https?://", link)]
        paths = [((ROOT / page).parent / target).resolve() for target in targets if target.endswith(".md")]
        waiting += [str(path.relative_to(ROOT)) for path in paths]
    assert set(page_names()) - reached == set()


def test_every_picture_is_shown():
    shown = {Path(link).name for page in page_names() for link in links(page)}
    pictures = {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert pictures - shown == set()


def test_readme_names_every_part_of_the_tree():
    tree = read("README.md").split("## The tree")[1].split("\n## ")[0]
    named = set(re.findall(r"^ {4,}([\w.]+)/? ", tree, re.M)) | set(re.findall(r"\b(\w+)/", tree))
    packages = {path.parent.name for path in (ROOT / "hive_ds").glob("*/__init__.py")}
    assert packages - named == set()
