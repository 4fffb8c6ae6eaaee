"""Samples in the order of an epoch, prepared, bad ones replaced."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from streaming import StreamingDataset

from hive_ds.data.batch import BadSample, PreparedSample
from hive_ds.data.environment import find_world
from hive_ds.data.mds.shared_memory import own_prefix
from hive_ds.data.schema import Sample, from_columns
from hive_ds.errors import HiveError

CANONICAL_NODES = 1
"""Pinned, so that the order of samples does not depend on the machines. Every node reads every shard."""
SHUFFLE_BLOCK = 1 << 18
"""Samples within which py1e spreads a shard; streaming's default depends on the number of canonical nodes."""
MAX_REPLACEMENTS = 100
"""Bad samples in a row before a loader gives up: a shard is broken, not a sample."""


class SampleDataset(StreamingDataset):
    """A StreamingDataset that prepares samples, replaces bad ones and orders them by the global batch alone.

    For one folder, seed and global batch, step k of an epoch sees the same samples however they are split over
    ranks, micro-batches and workers. Three things make it so: streaming deals its order out sample by sample to
    the ranks, the canonical nodes are pinned to one, and an epoch is rounded up to whole global batches with samples
    drawn again (streaming's own up-sampling, another draw each epoch), so that no rank has a batch more than another.
    """

    def __init__(
        self,
        folder: str,
        *,
        cache: str | None,
        prepare: Callable[[Sample], PreparedSample],
        micro_batch_size: int,
        global_batch_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.world = find_world()
        self.global_batch_size = global_batch_size
        self._prepare = prepare
        remote, local = _location(folder, cache)
        with own_prefix():
            super().__init__(
                remote=remote,
                local=local,
                batch_size=micro_batch_size,
                shuffle=shuffle,
                shuffle_seed=seed,
                shuffle_algo="py1e",
                shuffle_block_size=SHUFFLE_BLOCK,
                num_canonical_nodes=CANONICAL_NODES,
                partition_algo="orig",
                predownload=max(8 * micro_batch_size, 64),
            )
        # streaming takes the epoch's size before it knows the number of samples, so round up afterwards.
        self.epoch_size = -(-self.num_samples // global_batch_size) * global_batch_size
        self.streams[0].choose = self.epoch_size
        self.length = self.epoch_size // self.world.size

    def __getitem__(self, at: Any) -> PreparedSample:
        """Prepare sample ``at``, or the first good one after it; the result lists the bad ones in between."""
        bad: list[BadSample] = []
        for step in range(min(MAX_REPLACEMENTS, self.num_samples)):
            index = (int(at) + step) % self.num_samples
            name = f"number {index}"
            try:
                sample = from_columns(self.get_item(index))
                name = sample.id
                return replace(self._prepare(sample), bad=tuple(bad))
            except (HiveError, ValueError) as error:
                bad.append(BadSample(name, str(error)))
        raise HiveError(f"{len(bad)} samples in a row cannot be used; the last, {bad[-1].id}: {bad[-1].reason}")

    def __iter__(self) -> Iterator[Any]:
        """Iterate over this worker's samples of the epoch; streaming's threads end when the iterator is dropped."""
        try:
            yield from super().__iter__()
        finally:
            if hasattr(self, "_iterator"):
                self._iterator.non_blocking_exit()

    def seek(self, epoch: int, samples: int) -> None:
        """Let the next iteration start at sample ``samples`` (over all ranks) of ``epoch``."""
        self.next_epoch = epoch
        self.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": samples,
                "num_canonical_nodes": CANONICAL_NODES,
                "shuffle_seed": self.shuffle_seed,
            }
        )


def _location(folder: str, cache: str | None) -> tuple[str | None, str]:
    """Return streaming's remote and local folder for ``folder``; HiveError where it holds no samples."""
    if "://" in folder:
        if not cache:
            raise HiveError(f"data folder {folder} is remote: expected data.cache, a local folder for its shards")
        # streaming knows another file system that shards are copied from by its bare path.
        return folder.removeprefix("file://"), cache
    index = Path(folder) / "index.json"
    if not Path(folder).is_dir():
        raise HiveError(f"data folder {folder}: does not exist")
    if not index.is_file():
        raise HiveError(f"data folder {folder}: holds no index.json; expected MDS shards (hive-ds data convert)")
    try:
        samples = sum(shard["samples"] for shard in json.loads(index.read_bytes())["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise HiveError(f"data folder {folder}: index.json cannot be read ({error!r})") from error
    if not samples:
        raise HiveError(f"data folder {folder}: holds no samples")
    return None, folder
