"""Image files by name: in a folder, a zip or a tar."""

from __future__ import annotations

import logging
import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hive_ds.errors import HiveError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "img")
"""Of files that are taken for images. What Pillow cannot decode (heic) is rejected, and not passed over."""


def files_below(folder: Path) -> Iterator[str]:
    """Paths below ``folder`` of the files that are not hidden."""
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (str(Path(at, name).relative_to(folder)) for name in names if not name.startswith("."))


def is_image(name: str) -> bool:
    """Whether a file of that name is taken for an image."""
    return Path(name).suffix.lower().lstrip(".") in IMAGE_SUFFIXES


class ImageStore(Protocol):
    """Files by name, for any number of forked processes."""

    def read(self, name: Any) -> bytes:
        """The file called ``name``; HiveError where there is none."""
        ...


def open_store(path: str | Path) -> ImageStore:
    """A folder, .zip or .tar of images; HiveError where it is none of these."""
    path = Path(path)
    if path.is_dir():
        return FolderStore(path)
    if not path.is_file():
        raise HiveError(f"images {path}: does not exist; expected a folder, a .zip or a .tar")
    if zipfile.is_zipfile(path):
        return ZipStore(path)
    return TarStore(path)


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise HiveError(f"image {name!r}: expected a path")
    return name


@dataclass(frozen=True)
class FolderStore:
    """Files below a folder; a name that leads outside is refused. Links in it are followed, wherever they go."""

    folder: Path

    def read(self, name: Any) -> bytes:
        """The file at ``name`` below the folder."""
        try:
            file, folder = (os.path.abspath(path) for path in (self.folder / _name(name), self.folder))
            real = os.path.realpath(file)  # of an absolute name, which may go another way to the folder
            if not (Path(file).is_relative_to(folder) or Path(real).is_relative_to(os.path.realpath(folder))):
                raise HiveError(f"image {name}: lies outside {self.folder}")
            return Path(file).read_bytes()
        except OSError as error:
            raise HiveError(f"image {name}: {error.strerror}") from error
        except ValueError as error:  # a path with a null character
            raise HiveError(f"image {name!r}: {error}") from error


class ZipStore:
    """Members of a zip file; each process opens it for itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[int, zipfile.ZipFile] = {}
        with zipfile.ZipFile(path) as file:
            self._names = _without_top(file.namelist())

    def read(self, name: Any) -> bytes:
        """The member ``name``, or the one of that name below the archive's only top folder."""
        member = self._names.get(_name(name).removeprefix("./"))
        if member is None:
            raise HiveError(f"image {name}: not in {self._path.name}")
        try:
            if os.getpid() not in self._files:
                self._files[os.getpid()] = zipfile.ZipFile(self._path)
            return self._files[os.getpid()].read(member)
        except Exception as error:  # every compressor has errors of its own; also: encrypted
            raise HiveError(f"image {name}: cannot be read from {self._path.name} ({error})") from error


def _without_top(names: list[str]) -> dict[str, str]:
    """Names by which members are found: their own, and what is no other's own, without a top folder that all share.

    All but hidden files and a folder ``__MACOSX``, which macOS puts beside it.
    """
    found = {name: name for name in names if not name.endswith("/")}
    shown = [name for name in found if not name.startswith("__MACOSX/") and not name.split("/")[-1].startswith(".")]
    tops = {name.split("/", 1)[0] for name in shown}
    if len(tops) == 1 and all("/" in name for name in shown):
        found = {name.split("/", 1)[1]: name for name in shown} | found
    return found


class Member(NamedTuple):
    """Where a file's bytes lie in an uncompressed tar."""

    name: str
    start: int
    size: int


def tar_members(path: Path) -> Iterator[Member]:
    """Regular files of an uncompressed tar, in order; HiveError where it is compressed or no tar.

    A hard link, which tar writes for a file that it has already, is that file again. A tar that was cut short gives
    the members that are whole, and a warning.
    """
    size, whole = path.stat().st_size, dict[str, Member]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                found = whole.get(member.linkname) if member.islnk() else None
                if member.isfile() and member.offset_data + member.size <= size:
                    found = Member(member.name, member.offset_data, member.size)
                if found:
                    whole[member.name] = found._replace(name=member.name)
                    yield whole[member.name]
                elif member.isfile():
                    logger.warning("%s is cut short: %s is not whole and is left out", path, member.name)
                elif not member.isdir():
                    logger.warning("%s: %s is a link to no earlier file and is left out", path, member.name)
    except tarfile.TarError as error:
        if not whole:
            raise HiveError(f"{path}: is no uncompressed tar ({error}); unpack it if it is compressed") from error
        logger.warning("%s is cut short after %d files (%s); the rest is left out", path, len(whole), error)


def read_span(path: Path, member: Member) -> bytes:
    """The bytes of ``member``."""
    with path.open("rb") as file:
        file.seek(member.start)
        return file.read(member.size)


class TarStore:
    """Members of an uncompressed tar, found by an index made once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        members = {member.name.removeprefix("./"): member for member in tar_members(path)}
        if not members:
            raise HiveError(f"images {path}: the tar holds no files")
        self._members = {name: members[own] for name, own in _without_top(list(members)).items()}

    def read(self, name: Any) -> bytes:
        """The member ``name``, or the one of that name below the archive's only top folder."""
        member = self._members.get(_name(name).removeprefix("./"))
        if member is None:
            raise HiveError(f"image {name}: not in {self._path.name}")
        return read_span(self._path, member)
