"""Writing and reading whole folders of MDS shards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from streaming import MDSWriter

from hive_ds.data.mds.reading import open_folder
from hive_ds.data.mds.sizes import sample_size, write_sizes
from hive_ds.data.schema import MDS_COLUMNS, Sample, to_columns
from hive_ds.errors import HiveError
from hive_ds.files import whole_folder

SHARD_BYTES = 1 << 26
"""Largest shard, uncompressed: streaming's default."""


def write_mds(samples: Iterable[Sample], folder: str | Path) -> int:
    """Write ``samples`` to a folder of MDS shards, which appears whole or not at all, and return their number.

    HiveError where ``folder`` holds anything already, or where there is no sample.
    """
    sizes = []
    with whole_folder(Path(folder)) as aside:
        with MDSWriter(columns=MDS_COLUMNS, out=str(aside), size_limit=SHARD_BYTES, hashes=["sha256"]) as writer:
            for sample in samples:
                writer.write(to_columns(sample))
                sizes.append(sample_size(sample))
        if not sizes:
            raise HiveError(f"output {folder}: no sample to write, so no folder was made")
        write_sizes(aside, sizes)
    return len(sizes)


def read_mds(folder: str | Path) -> list[Sample]:
    """Read all samples of a local folder of MDS shards, in order; HiveError where there is none."""
    return list(open_folder(folder))
