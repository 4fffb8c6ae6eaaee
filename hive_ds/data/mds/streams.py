"""The folders that samples come from, each with its share of an epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from streaming import Stream

from hive_ds.errors import HiveError
from hive_ds.names import does_not_exist


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
        return Stream(remote=folder.removeprefix("file://"), local=str(Path(cache) / name))
    except ValueError as error:
        raise HiveError(f"data folder {folder}: {error}") from error


def check_index(folder: str) -> None:
    """HiveError where the local ``folder`` is not one of MDS shards with samples in it."""
    index = Path(folder) / "index.json"
    if Path(folder).is_file():
        raise HiveError(f"data folder {folder}: is a file; expected a folder of MDS shards (hive-ds data convert)")
    if not Path(folder).is_dir():
        raise HiveError(f"data folder {folder}: {does_not_exist(folder)}")
    if not index.is_file():
        raise HiveError(f"data folder {folder}: holds no index.json; expected MDS shards (hive-ds data convert)")
    try:
        samples = sum(shard["samples"] for shard in json.loads(index.read_bytes())["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise HiveError(f"data folder {folder}: index.json cannot be read ({type(error).__name__}: {error})") from error
    if not samples:
        raise HiveError(f"data folder {folder}: holds no samples")


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of ``weights`` that sum to ``total``; the largest remainders are rounded up."""
    exact = total * np.asarray(weights, np.float64) / np.sum(weights)
    parts = np.floor(exact).astype(int)
    # Stable, so that of equal remainders the first is rounded up, on every machine.
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts.tolist()
