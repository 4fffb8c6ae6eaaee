"""The tutorial's blocks, section by section, as somebody would paste them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from doc_pages import Block, blocks, read

PAGE = "docs/tutorial.md"
ALONE, SLURM, SSH = ("1.", "2.", "3.", "4.", "5."), "6.", "7."
"""Sections of one machine, and of clusters, by the number in their headings."""
SETTINGS = ""
"""What stands before the first section."""


def sections() -> dict[str, list[Block]]:
    """Blocks by the number of their section; those under a comment ``skip: ...`` are left out."""
    lines = read(PAGE).splitlines()
    found: dict[str, list[Block]] = {}
    for block in blocks(PAGE):
        above = lines[: block.line - 1]
        if above[-1].startswith("<!-- skip:"):
            continue
        heading = next((line.split()[1] for line in reversed(above) if line.startswith("## ")), SETTINGS)
        found.setdefault(heading, []).append(block)
    return found


def settings() -> str:
    """The shell lines that hold for all sections."""
    (block,) = sections()[SETTINGS]
    return block.text


def paste(block: Block, folder: Path) -> str:
    """What a block prints in ``folder``; it must succeed."""
    code = block.text
    if block.language == "python":
        code = f"python - <<'BLOCK'\n{code}\nBLOCK"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", f"{settings()}\n{code}"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}\n{done.stdout}\n{done.stderr}"
    return done.stdout
