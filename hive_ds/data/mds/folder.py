"""Writing and reading whole folders of MDS shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from streaming import MDSWriter

from hive_ds.data.mds.reading import open_folder
from hive_ds.data.mds.sizes import sample_size, write_sizes
from hive_ds.data.schema import MDS_COLUMNS, Sample, to_columns
from hive_ds.errors import HiveError

SHARD_BYTES = 1 << 26
"""Largest shard, uncompressed: streaming's default."""


class MdsFolderWriter:
    """Write a folder of MDS shards that appears whole or not at all.

    Shards go to a hidden folder beside ``folder``, which is renamed when the ``with`` block ends well and removed
    when it does not. Raises HiveError where ``folder`` holds anything already, or where nothing was written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise HiveError(f"output {self.folder}: exists and is not an empty folder; name a new one or remove it")
        self.aside = self.folder.absolute().with_name(f".{self.folder.name}.partial-{os.getpid()}")
        """Where files go until the end; others may be laid beside the shards."""
        self._sizes: list[tuple[int, int]] = []

    def __enter__(self) -> MdsFolderWriter:
        self.aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.aside, ignore_errors=True)
        self._writer = MDSWriter(
            columns=MDS_COLUMNS, out=str(self.aside), size_limit=SHARD_BYTES, hashes=["sha256"], keep_local=True
        )
        return self

    def write(self, sample: Sample) -> None:
        """Append ``sample``."""
        self._writer.write(to_columns(sample))
        self._sizes.append(sample_size(sample))

    @property
    def num_samples(self) -> int:
        """Samples written so far."""
        return len(self._sizes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.finish()
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self.aside, ignore_errors=True)

    def _publish(self) -> None:
        if not self.num_samples:
            raise HiveError(f"output {self.folder}: no sample to write, so no folder was made")
        write_sizes(self.aside, self._sizes)
        if self.folder.exists():
            self.folder.rmdir()
        self.aside.rename(self.folder)


def write_mds(samples: Iterable[Sample], folder: str | Path) -> int:
    """Write ``samples`` to a new folder of MDS shards and return their number; see `MdsFolderWriter` for errors."""
    with MdsFolderWriter(folder) as writer:
        for sample in samples:
            writer.write(sample)
    return writer.num_samples


def read_mds(folder: str | Path) -> list[Sample]:
    """Read all samples of a local folder of MDS shards, in order; HiveError where there is none."""
    return list(open_folder(folder))
