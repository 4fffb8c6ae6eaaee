"""MDS shards: the one file that imports ``streaming`` (mosaicml-streaming).

Importing this module needs the extra; everything else in `hive_ds.data` imports it inside functions, so that
the rest of the package works without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from hive_ds.data.schema import MDS_COLUMNS, Sample, to_columns
from hive_ds.errors import HiveError

try:
    from streaming import MDSWriter
except ImportError as error:
    raise HiveError(
        f"MDS shards need mosaicml-streaming ({error}): pip install 'hive-ds[streaming]' (it pins transformers < 5)"
    ) from error

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
        self.num_samples = 0

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
        self.num_samples += 1

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
        if self.folder.exists():
            self.folder.rmdir()
        self.aside.rename(self.folder)


def write_mds(samples: Iterable[Sample], folder: str | Path) -> int:
    """Write ``samples`` to a new folder of MDS shards and return their number; see `MdsFolderWriter` for errors."""
    with MdsFolderWriter(folder) as writer:
        for sample in samples:
            writer.write(sample)
    return writer.num_samples
