"""Versions of what runs: this package, its commit, the libraries."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hive_ds import __version__

LIBRARIES = ("torch", "deepspeed", "transformers", "triton", "mosaicml-streaming")


def installed_versions() -> dict[str, str | None]:
    """Versions by name, ``hive-ds`` and ``commit`` first; None for what is not installed, or runs from no clone."""
    return {"hive-ds": __version__, "commit": _commit(), **{library: _version(library) for library in LIBRARIES}}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
