"""What the names of folders and models in a recipe stand for."""

from __future__ import annotations


def names_folder(name: str) -> bool:
    """Whether the name of a model is that of a folder, and of none on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def how_made(path: str) -> str:
    """What makes a folder that the recipes `tiny` name, to be said where it is not there; nothing for all others."""
    return "`make quickstart` makes it" if path.startswith("runs/quickstart/") else ""


def does_not_exist(path: str) -> str:
    """What to say of a folder that is not there."""
    hint = how_made(path)
    return f"does not exist; {hint}" if hint else "does not exist"
