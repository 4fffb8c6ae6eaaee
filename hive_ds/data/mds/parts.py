"""A folder of shards made of parts: each part is written by one process, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from streaming import MDSWriter
from streaming.base.compression import get_compressions, is_compression
from streaming.base.storage import CloudDownloader, CloudUploader
from streaming.base.storage.upload import UPLOADERS

from hive_ds.data.mds.folder import SHARD_BYTES
from hive_ds.data.mds.index import INDEX
from hive_ds.data.schema import MDS_COLUMNS, Sample, to_columns
from hive_ds.errors import HiveError, OutsideError, one_line
from hive_ds.files import flush


def check_compression(name: str | None) -> None:
    """HiveError where streaming knows no compression of that ``name``."""
    if name is not None and not is_compression(name):
        known = ", ".join(sorted({known.partition(":")[0] for known in get_compressions()}))
        raise HiveError(f"compression {name!r}: expected one of {known}, with a level or without, as zstd:9")


def check_remote(remote: str) -> None:
    """HiveError where streaming uploads to no URL as ``remote``."""
    scheme = urlsplit(remote).scheme
    if scheme not in UPLOADERS:
        known = ", ".join(f"{one}://" for one in UPLOADERS if one and ":" not in one)
        raise HiveError(f"output {remote}: expected a folder, or a URL that starts with {known}")


class PartWriter:
    """Write the shards of one part to ``aside``, then move them to ``folder`` in one step.

    With ``remote`` they are uploaded there instead, and ``folder`` holds nothing.
    """

    def __init__(self, aside: Path, folder: Path, *, compression: str | None, remote: str | None) -> None:
        self._aside, self._folder, self._remote = aside, folder, remote
        shutil.rmtree(aside, ignore_errors=True)
        self._writer = MDSWriter(
            columns=MDS_COLUMNS, out=str(aside), compression=compression, size_limit=SHARD_BYTES, hashes=["sha256"]
        )
        self.shards: list[dict[str, Any]] = []
        """Entries of the index once the part is done; their files' names start with the part's."""

    def __enter__(self) -> PartWriter:
        return self

    def write(self, sample: Sample) -> None:
        """Append ``sample``."""
        self._writer.write(to_columns(sample))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.finish()
        if kind is None:
            self._publish()
        shutil.rmtree(self._aside, ignore_errors=True)

    def _publish(self) -> None:
        index = self._aside / INDEX
        self.shards = [_below(self._folder.name, shard) for shard in json.loads(index.read_text())["shards"]]
        index.unlink()
        shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed before its record
        if self._remote is not None:
            upload(self._aside, sorted(os.listdir(self._aside)), f"{self._remote}/{self._folder.name}")
        elif self.shards:
            for file in self._aside.iterdir():
                flush(file)
            self._aside.rename(self._folder)
            flush(self._folder.parent)


def write_index(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Write the index of all parts, whose entries are ``shards``.

    streaming's own merge_index copies every part's index to a temporary folder first, and warns about it.
    """
    (folder / INDEX).write_text(json.dumps({"version": 2, "shards": list(shards)}, sort_keys=True))


def upload(folder: Path, names: Sequence[str], remote: str) -> None:
    """Copy files of ``folder`` to ``remote`` (s3://, gs://, ...), over what is there; the local ones are removed.

    OutsideError where the cloud does not take them.
    """
    try:
        uploader = CloudUploader.get((str(folder), remote), keep_local=False, exist_ok=True)
        for name in names:
            uploader.upload_file(name)
    except Exception as error:  # of whatever cloud
        raise OutsideError(
            f"output {remote}: cannot be uploaded to ({one_line(error)}); what is done stays: run the same command to "
            "go on"
        ) from error


def holds_index(remote: str) -> bool:
    """Whether ``remote`` is a folder of shards already. What cannot be read, writing will complain of."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, INDEX)
        with suppress(Exception):  # of whatever cloud
            CloudDownloader.direct_download(f"{remote}/{INDEX}", str(index))
        return index.is_file()


def _below(part: str, shard: dict[str, Any]) -> dict[str, Any]:
    for key in ("raw_data", "zip_data"):
        if shard.get(key):
            shard[key]["basename"] = f"{part}/{shard[key]['basename']}"
    return shard
