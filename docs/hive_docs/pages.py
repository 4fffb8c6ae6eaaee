"""Every file of docs/ that is made from the code, by name."""

from __future__ import annotations

from pathlib import Path

from hive_docs.commands import commands_page
from hive_docs.recipes import recipes_page

DOCS = Path(__file__).resolve().parents[1]


def reference() -> dict[str, str]:
    """The pages of the reference, by their path below docs/. Nothing heavy is imported for them."""
    return {"reference/commands.md": commands_page(), "reference/recipes.md": recipes_page()}


def pages() -> dict[str, str]:
    """All of it, pictures too, which need torch and transformers."""
    from hive_docs.pictures import pictures

    return {**reference(), **pictures()}
