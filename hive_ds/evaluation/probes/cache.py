"""The cache of features: one folder an entry, there whole or not at all, read by memory mapping.

An entry is written aside and renamed. What a killed process left aside is never read, and is removed by the next one
that opens the cache: a file lock, which ends with its process, tells the dead from the living.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from hive_ds.errors import HiveError, OutsideError
from hive_ds.files import flush, must_write

FORMAT = 1
"""Raise it when features of the same key would come out differently."""
ASIDE = ".partial-"
SPARE = 1.05
"""Free space is asked for with 5 % to spare."""


@dataclass(frozen=True)
class Features:
    """Features of one set of images at one block.

    Attributes:
        values: (I, D) or (I, P, D), float32 or float16, in memory or mapped from a file.
        counts: (I,) patches of each image where ``values`` holds tokens; the rest of P is padding.
    """

    values: np.ndarray
    counts: np.ndarray | None = None


@dataclass(frozen=True)
class FeatureKey:
    """Everything that features depend on: hashes of weights, settings and images, block and number types."""

    weights: str
    config: str
    processor: str
    images: str
    block: int
    kind: str
    computed: str
    stored: str

    def as_dict(self) -> dict:
        """The key and the format, as ``meta.json`` has them."""
        return {"format": FORMAT, **asdict(self)}

    @property
    def folder(self) -> str:
        """Name of the entry's folder."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:32]


class FeatureSink(Protocol):
    """Takes the features of one block batch by batch."""

    def append(self, values: np.ndarray, counts: np.ndarray | None) -> None:
        """The next images' features."""
        ...

    def finish(self) -> Features:
        """All of them."""
        ...


class MemorySink:
    """Features that stay in memory."""

    def __init__(self) -> None:
        self._values: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def append(self, values: np.ndarray, counts: np.ndarray | None) -> None:
        """The next images' features."""
        self._values.append(values)
        if counts is not None:
            self._counts.append(counts)

    def finish(self) -> Features:
        """All of them."""
        return Features(np.concatenate(self._values), np.concatenate(self._counts) if self._counts else None)


class FeatureCache:
    """A folder of entries. Several processes may use it at once.

    Raises:
        HiveError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HiveError(f"feature cache {self.folder}: cannot be made ({error.strerror})") from error
        self._remove_dead()

    def find(self, key: FeatureKey) -> Features | None:
        """The entry of ``key``, mapped from its file; None where there is none, or it is not what was written."""
        return _read_entry(self.folder / key.folder, key)

    @contextmanager
    def write(self, key: FeatureKey, size: int) -> Iterator[EntryWriter]:
        """A writer of the entry of ``key`` with ``size`` images; what is not finished when the block ends is removed.

        HiveError where the disk is too full.
        """
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        with (aside / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            aside = aside.rename(self.folder / f"{ASIDE}{aside.name}")  # others judge it by its lock from here on
            writer = EntryWriter(aside, self.folder / key.folder, key, size)
            try:
                yield writer
            finally:
                writer.close()
                shutil.rmtree(aside, ignore_errors=True)

    def _remove_dead(self) -> None:
        """Remove what killed processes left aside."""
        for aside in self.folder.glob(f"{ASIDE}*"):
            try:
                with (aside / "lock").open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(aside, ignore_errors=True)
            except OSError:  # in use, or just being made
                continue


class EntryWriter:
    """Writes one entry, batch by batch and in order: a full disk is then an error and not a signal."""

    def __init__(self, aside: Path, folder: Path, key: FeatureKey, size: int) -> None:
        self._aside, self._folder, self._key, self._size = aside, folder, key, size
        self._file: BinaryIO | None = None
        self._shape: tuple[int, ...] = ()
        self._written = 0
        self._counts: list[np.ndarray] = []

    def append(self, values: np.ndarray, counts: np.ndarray | None) -> None:
        """The next images' features."""
        with must_write(self._folder.parent, "the feature cache needs room there"):
            file = self._file or self._open(values)
            file.write(np.ascontiguousarray(values).data)
        self._written += len(values)
        if counts is not None:
            self._counts.append(counts)

    def finish(self) -> Features:
        """Make the entry appear, and read it; where another process was faster, its entry stays."""
        if self._written != self._size:
            raise HiveError(f"feature cache {self._folder}: {self._written} images came, expected {self._size}")
        self.close()
        with must_write(self._folder.parent, "the feature cache needs room there"):
            if self._counts:
                np.save(self._aside / "counts.npy", np.concatenate(self._counts))
            meta = {"key": self._key.as_dict(), "shape": list(self._shape), "counts": bool(self._counts)}
            (self._aside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
            for path in self._aside.iterdir():
                flush(path)
            self._publish()
        entry = _read_entry(self._folder, self._key)
        if entry is None:
            raise HiveError(f"feature cache {self._folder}: cannot be read back")
        return entry

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, values: np.ndarray) -> BinaryIO:
        self._shape = (self._size, *values.shape[1:])
        needed, free = values[0].nbytes * self._size, shutil.disk_usage(self._aside).free
        if needed * SPARE > free:
            raise OutsideError(
                f"feature cache {self._folder.parent}: block {self._key.block} needs {needed / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free"
            )
        self._file = (self._aside / "features.npy").open("wb")
        descr = np.lib.format.dtype_to_descr(values.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_2_0(self._file, header)
        return self._file

    def _publish(self) -> None:
        try:
            self._aside.rename(self._folder)
        except OSError:  # there already: another process was faster, or it is damaged
            if _read_entry(self._folder, self._key) is None:
                shutil.rmtree(self._folder)
                self._aside.rename(self._folder)
        flush(self._folder.parent)


def _read_entry(folder: Path, key: FeatureKey) -> Features | None:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        values = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
        counts = np.load(folder / "counts.npy", allow_pickle=False) if meta["counts"] else None
        whole = meta["key"] == key.as_dict() and meta["shape"] == list(values.shape)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Features(values, counts) if whole else None
