"""Where compiled kernels are kept: on this machine's own disk, not in a home folder that a cluster shares."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def use_local_cache() -> Path:
    """Point Triton's cache at a folder of this machine, unless TRITON_CACHE_DIR says where; returns the folder.

    Triton's own default lies in the home folder. Where that is on a network, ranks of several nodes write there at once
    and read each other's half-written files.

    Raises:
        PermissionError: the folder belongs to someone else, who could put code there.
    """
    given = os.environ.get("TRITON_CACHE_DIR")
    if given:
        folder = Path(given)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir()) / f"hive-triton-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; expected a folder of one's own: set TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    return folder
