"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hive_ds.errors import HiveError, OutsideError, names_wrong_path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file in one step, over what is there; it is on disk when this returns.

    A link stays one; a device or a pipe (/dev/null) is written to as it is: root would put a file in its place.

    Raises:
        HiveError: ``path`` is a folder.
        OSError: names ``path``, which is what it was.
    """
    if path.is_dir():
        raise HiveError(f"{path}: is a folder; expected the name of a file to write")
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data)
        flush(aside)
        aside.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def must_write(path: Path, advice: str) -> Iterator[None]:
    """A `HiveError` that names ``path``, and says ``advice``, where what is written inside cannot be.

    An `OutsideError` where the disk is full or fails.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        kind = HiveError if names_wrong_path(error) else OutsideError
        raise kind(f"{path}: cannot be written ({reason}); {advice}") from error


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before something else says that it does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def finish_folder(folder: Path) -> None:
    """What a folder needs before it gets its name: `give_usual_access`, and `flush` of all that is in it."""
    for weights in folder.rglob("*.safetensors"):
        give_usual_access(weights)
    for path in (*folder.rglob("*"), folder):
        flush(path)


def give_usual_access(weights: Path) -> None:
    """Let whoever may read a new file there read this one; safetensors 0.8 lets nobody but its owner."""
    usual = weights.with_name(f".{weights.name}.access")
    usual.touch()
    access = stat.S_IMODE(usual.stat().st_mode)
    usual.unlink()
    if stat.S_IMODE(weights.stat().st_mode) != access:
        weights.chmod(access)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when the block ends, and is gone if it raises. A link stays one.

    Raises:
        HiveError: ``out`` is there and is not an empty folder, or is one that no other can take the place of.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HiveError(f"folder {out}: exists and is not an empty folder; name a new one or remove it")
    target = Path(os.path.realpath(out))
    for kind, is_one in (("the current folder", target == Path.cwd()), ("a mount point", os.path.ismount(target))):
        if is_one:
            raise HiveError(f"folder {out}: is {kind}, which a finished folder cannot replace; name a new one in it")
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
        finish_folder(aside)
        if target.exists():
            target.rmdir()
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
