"""A finished folder of MDS shards, read sample by sample; nothing is written into it, compressed or not."""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from streaming.base.compression import decompress
from streaming.base.format.mds.reader import MDSReader

from hive_ds.data.mds.index import read_index
from hive_ds.data.schema import Sample, from_columns
from hive_ds.errors import HiveError, one_line


@dataclass(frozen=True)
class ShardFile:
    """One file that the index lists: where it lies, its bytes, and its digests in hex by algorithm."""

    path: Path
    bytes: int
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Shard:
    """One entry of the index: the samples from ``first`` on, in a raw file, a compressed one, or both."""

    name: str
    first: int
    samples: int
    raw: ShardFile
    zipped: ShardFile | None
    compression: str | None
    reader: MDSReader = field(repr=False, compare=False)

    def read_raw(self) -> bytes:
        """Return the uncompressed bytes of the shard, from whichever file is there; HiveError where none can be."""
        path = self.raw.path
        try:
            if self.zipped is None or path.is_file():
                return path.read_bytes()
            path = self.zipped.path
            return decompress(self.compression, path.read_bytes())
        except OSError as error:
            raise HiveError(f"shard {self.name}: {path} cannot be read ({error.strerror})") from error
        except Exception as error:  # every compressor has errors of its own, zstd's is a plain Exception
            raise HiveError(f"shard {self.name}: {path} cannot be decompressed ({error})") from error


class ShardFolder:
    """The samples of a folder by number. Of the data, at most one decompressed shard is held."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self.folder = folder
        self.shards = shards
        self._ends = list(accumulate(shard.samples for shard in shards))
        self._held: tuple[str, bytes] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def shard_of(self, index: int) -> Shard:
        """Return the shard that holds sample ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.shards[bisect_right(self._ends, index)]

    def sample_id(self, index: int) -> str:
        """Return the name of sample ``index``; HiveError as in `get`."""
        return self.get(index).id

    def images(self, index: int) -> tuple[bytes, ...]:
        """Return the encoded images of sample ``index``; HiveError as in `get`."""
        return self.get(index).images

    def columns(self, index: int) -> dict[str, Any]:
        """Return sample ``index`` as the values of `MDS_COLUMNS`; HiveError where its bytes cannot be understood."""
        shard = self.shard_of(index)
        place = f"sample number {index} in shard {shard.name}"
        try:
            return dict(shard.reader.decode_sample(self._bytes(shard, index - shard.first)))
        except HiveError:
            raise
        except Exception as error:  # bytes that are not what the index says fail in any decoder, in any way
            raise HiveError(f"{place}: cannot be read ({one_line(error)})") from error

    def get(self, index: int) -> Sample:
        """Return sample ``index``; HiveError where it cannot be read or makes no sense."""
        return sample_from(self.columns(index), index)

    def __iter__(self) -> Iterator[Sample]:
        return (self.get(index) for index in range(len(self)))

    def _bytes(self, shard: Shard, number: int) -> bytes:
        if shard.zipped is None or shard.raw.path.is_file():
            with shard.raw.path.open("rb") as file:
                return _sample_bytes(file, number)
        if self._held is None or self._held[0] != shard.name:
            self._held = (shard.name, shard.read_raw())
        return _sample_bytes(io.BytesIO(self._held[1]), number)


def _sample_bytes(shard: BinaryIO, number: int) -> bytes:
    """Read one sample: a shard starts with the number of samples, then where each begins and the last one ends.

    streaming's own reader takes damaged places as they are, and asks for up to 4 GB of memory.
    """
    shard.seek(4 * (1 + number))
    begin, end = struct.unpack("<II", shard.read(8))
    if not begin <= end <= shard.seek(0, io.SEEK_END):
        raise ValueError(f"said to lie at bytes {begin} to {end}")
    shard.seek(begin)
    return shard.read(end - begin)


def sample_from(columns: Mapping[str, Any], index: int) -> Sample:
    """Build sample number ``index`` from its columns; HiveError where they make no sense."""
    try:
        return from_columns(columns)
    except HiveError:
        raise
    except Exception as error:  # JSON of another form: turns that are no list, sizes that are no numbers
        raise HiveError(f"sample number {index}: columns of another form ({one_line(error)})") from error


def open_folder(folder: str | Path) -> ShardFolder:
    """Read the index of a local folder of MDS shards; HiveError as in `read_index`."""
    root, shards, first = Path(folder), [], 0
    for entry in read_index(folder):
        raw = _file(root, entry["raw_data"])
        zipped = _file(root, entry["zip_data"]) if entry["zip_data"] else None
        reader = MDSReader.from_json(str(root), None, entry)
        name, samples = entry["raw_data"]["basename"], entry["samples"]
        shards.append(Shard(name, first, samples, raw, zipped, reader.compression, reader))
        first += samples
    return ShardFolder(root, shards)


def _file(root: Path, entry: dict[str, Any]) -> ShardFile:
    return ShardFile(root / entry["basename"], entry["bytes"], entry["hashes"])
