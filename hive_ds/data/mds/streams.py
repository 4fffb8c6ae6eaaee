"""The folders that samples come from, each with its share of an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from streaming import Stream

from hive_ds.data.mds.index import INDEX, read_index
from hive_ds.errors import HiveError


class RemoteStream(Stream):
    """A stream whose index is looked at before samples are; ``folder`` is its name in the recipe."""

    folder: str

    def get_shards(self, *args: Any) -> Any:
        """Streaming's readers of the shards; HiveError where the index that was copied cannot be used."""
        try:
            return super().get_shards(*args)
        finally:  # also where streaming ended at a value that it does not expect
            if Path(self.local, INDEX).is_file():
                read_index(self.local, self.folder)


def make_streams(weights: Mapping[str, float], *, cache: str | None, cache_limit: str | None) -> list[Stream]:
    """One stream a folder, in the order of ``weights``; HiveError where one holds no samples or cannot be cached."""
    if cache_limit and not all(map(_is_remote, weights)):
        local = next(folder for folder in weights if not _is_remote(folder))
        raise HiveError(
            f"data.cache_limit {cache_limit}: expected remote data folders alone, for streaming would delete shards of "
            f"{local}, which is local"
        )
    return [_stream(folder, cache) for folder in weights]


def _is_remote(folder: str) -> bool:
    return "://" in folder


def _stream(folder: str, cache: str | None) -> Stream:
    if not _is_remote(folder):
        check_index(folder)
        return Stream(local=folder)
    if not cache:
        raise HiveError(f"data folder {folder} is remote: expected data.cache, a local folder for its shards")
    name = f"{folder.rstrip('/').rpartition('/')[2]}-{hashlib.sha256(folder.encode()).hexdigest()[:12]}"
    try:
        # streaming knows another file system that shards are copied from by its bare path.
        stream = RemoteStream(remote=folder.removeprefix("file://"), local=str(Path(cache) / name))
    except ValueError as error:
        raise HiveError(f"data folder {folder}: {error}") from error
    stream.folder = folder
    return stream


def check_index(folder: str) -> None:
    """HiveError where the local ``folder`` is not one of MDS shards with samples in it."""
    if not any(shard["samples"] for shard in read_index(folder)):
        raise HiveError(f"data folder {folder}: holds no samples")


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of ``weights`` that sum to ``total``; the largest remainders are rounded up."""
    exact = total * np.asarray(weights, np.float64) / np.sum(weights)
    parts = np.floor(exact).astype(int)
    # Stable, so that of equal remainders the first is rounded up, on every machine.
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts.tolist()
