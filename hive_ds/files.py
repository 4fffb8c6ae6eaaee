"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file in one step, over what is there; it is on disk when this returns."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    flush(aside)
    aside.replace(path)


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before something else says that it does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
