"""Samples in the order of an epoch, prepared, bad ones replaced."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.distributed import barrier
from streaming.base.shared import SharedMemory
from torch.utils.data import get_worker_info

from hive_ds.data.batch import BadSample, PreparedSample
from hive_ds.data.environment import find_world
from hive_ds.data.mds.balance import Order, balance_order, each_once
from hive_ds.data.mds.reading import sample_from
from hive_ds.data.mds.shared_memory import own_prefix, release_caches
from hive_ds.data.mds.sizes import SIZES, Sizes, read_sizes
from hive_ds.data.mds.streams import make_streams, share_out
from hive_ds.data.schema import Sample
from hive_ds.errors import HiveError, OutsideError, one_line

CANONICAL_NODES = 1
"""Pinned, so that the order of samples does not depend on the machines. Every node reads every shard."""
SHUFFLE_BLOCK = 1 << 18
"""Samples within which py1e spreads a shard; streaming's default depends on the number of canonical nodes."""
MAX_REPLACEMENTS = 100
"""Bad samples in a row before a loader gives up: a shard is broken, not a sample."""


class LocalShardError(HiveError):
    """A shard of a local folder is missing or cannot be decompressed: no other sample makes up for its own."""


class SampleDataset(StreamingDataset):
    """A StreamingDataset that prepares samples, replaces bad ones and orders them by the global batch alone.

    ``weights`` are the folders, local or remote, with the shares that their samples have in an epoch; it has as many
    samples as all folders together. Without ``shuffle`` the folders come one after another, by name.

    For the same folders, seed and global batch, step k of an epoch sees the same samples however they are split over
    ranks, micro-batches and workers. Three things make it so: streaming deals its order out sample by sample to
    the ranks, the canonical nodes are pinned to one, and an epoch is rounded up to whole global batches with samples
    drawn again (streaming's own up-sampling, another draw each epoch), so that no rank has a batch more than another.
    With ``balance`` the samples of each global batch are dealt to ranks and micro-batches by their sizes. Without
    ``train`` there is one epoch: each sample once, and at its end the last one as often as it takes.
    HiveError where a folder holds no samples, cannot be cached, is too large for the cache, or has no table of sizes.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        cache: str | None,
        cache_limit: str | None,
        prepare: Callable[[Sample], PreparedSample],
        micro_batch_size: int,
        global_batch_size: int,
        shuffle: bool,
        seed: int,
        balance: bool = False,
        train: bool = True,
    ) -> None:
        self.world, self._train = find_world(), train
        self._asked_for: dict[int, object] = {}
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self._prepare = prepare
        self.weights = dict(sorted(weights.items()))
        streams = make_streams(self.weights, cache=cache, cache_limit=cache_limit)
        with own_prefix(), _named_errors(self.weights, cache_limit):
            super().__init__(
                streams=streams,
                batch_size=micro_batch_size,
                shuffle=shuffle,
                shuffle_seed=seed,
                shuffle_algo="py1e",
                shuffle_block_size=SHUFFLE_BLOCK,
                num_canonical_nodes=CANONICAL_NODES,
                partition_algo="orig",
                predownload=max(8 * micro_batch_size, 64),
                cache_limit=cache_limit,
            )
        # streaming takes the epoch's size before it knows the number of samples, so round up and share out afterwards.
        self.epoch_size = -(-self.num_samples // global_batch_size) * global_batch_size
        shares = share_out(self.epoch_size, list(self.weights.values()))
        for stream, folder, samples in zip(self.streams, self.weights, shares, strict=True):
            if not samples:
                raise HiveError(
                    f"data.train: {folder} with weight {self.weights[folder]:g} of {sum(self.weights.values()):g} gets "
                    f"none of the {self.epoch_size} samples of an epoch; expected a weight that gets it one at least"
                )
            stream.choose = samples
        self.length = self.epoch_size // self.world.size
        self.held_out = self.num_samples
        """Without ``train``: so many samples carry loss, from the first on."""
        compressed = any(shard.compression for shard in self.shards)
        self._all_is_here = not compressed and all(stream.remote is None for stream in self.streams)
        for shard in np.flatnonzero(self._shard_states.numpy() == _ShardState.REMOTE):
            if self._stream_of(shard).remote is None:
                raise self._missing(shard)
        self._sizes = self._read_sizes() if balance else None
        if self._unique_rank_world.is_local_leader:
            weakref.finalize(self, release_caches, os.getpid(), self._shm_prefix_int).atexit = False

    def _read_sizes(self) -> Sizes:
        """The sizes of all samples; every rank reads them, so that every rank ends where they are missing."""
        if self._unique_rank_world.is_local_leader:
            for stream in self.streams:
                if stream.remote is not None:
                    with suppress(Exception):  # of whatever cloud: reading says what is missing
                        stream._download_file(SIZES)
        barrier()
        tables = zip(self.streams, self.samples_per_stream.tolist(), strict=True)
        return np.concatenate([read_sizes(stream.local, samples) for stream, samples in tables])

    def _stream_of(self, shard_id: int) -> Any:
        return self.streams[self.stream_per_shard[shard_id]]

    def _missing(self, shard_id: int) -> LocalShardError:
        shard: Any = self.shards[shard_id]
        name = shard.raw_data.basename
        return LocalShardError(f"data folder {shard.dirname}: index.json lists {name}, which is missing")

    def _not_there(self, shard_id: int, error: Exception) -> LocalShardError | OutsideError:
        """What to raise: a network may answer when the run is started again."""
        stream, shard = self._stream_of(shard_id), self.shards[shard_id]
        raw, zipped = shard.file_pairs[0]
        reason = one_line(error)
        if stream.remote is not None:
            folder = list(self.weights)[self.stream_per_shard[shard_id]]
            return OutsideError(f"data folder {folder}: {raw.basename} cannot be brought to {stream.local} ({reason})")
        if not (Path(stream.local) / zipped.basename).is_file():
            return self._missing(shard_id)
        return LocalShardError(f"data folder {stream.local}: {zipped.basename} cannot be decompressed ({reason})")

    def _share_work(self, sample_ids: Order) -> tuple[SharedMemory, SharedMemory | None]:
        """Let streaming hand out the order of the rest of an epoch, in which ours differs from its own."""
        if not self._train and sample_ids.size:
            sample_ids = each_once(sample_ids, self.num_samples)
        if self._sizes is not None and sample_ids.size:
            sample_ids = balance_order(sample_ids, self._sizes, self.global_batch_size)
        return super()._share_work(sample_ids)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """See to it that a shard is there, or will be.

        Streaming looks ahead by sample, each time with a lock of all processes and a look at the disk: 5 ms of CPU time
        for 16 samples. Of a cache that gives nothing up, once a shard is enough.

        Looking ahead raises nothing: streaming would end this process's samples there and go on with the next epoch.
        Who needs a sample of the shard asks again, blocking.
        """
        if self._all_is_here:  # asked by a sample that did not find it
            raise self._missing(shard_id)
        this_call = object()
        is_first = self._asked_for.setdefault(shard_id, this_call) is this_call  # one step: two threads ask at once
        if not (blocking or self.cache_limit or is_first):
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:  # of whatever cloud, or compressor
            # Left as it is, others would wait for ever; now they find no file, and ask themselves.
            self._shard_states[shard_id] = _ShardState.LOCAL
            if blocking:
                raise self._not_there(shard_id, error) from error

    def _prepare_thread(self, it: Any) -> None:
        """Bring shards ahead of need; of local folders there are none to bring.

        Streaming's two threads would still wake 140 times a second each, and take the interpreter from the loader.
        """
        if self._all_is_here:
            it.prepare_index = it.total
            it.on_exit()
        else:
            super()._prepare_thread(it)

    def _ready_thread(self, it: Any) -> None:
        """Wait for shards that are brought; for those of local folders nobody need wait."""
        if self._all_is_here:
            it.ready_index = it.total
            it.on_exit()
        else:
            super()._ready_thread(it)

    def __getitem__(self, at: Any) -> PreparedSample:
        """Prepare sample ``at``, or the first good one after it; the result lists the bad ones in between."""
        bad: list[BadSample] = []
        for step in range(min(MAX_REPLACEMENTS, self.num_samples)):
            index = (int(at) + step) % self.num_samples
            name = f"number {index}"
            try:
                sample = sample_from(self.get_item(index), index)
                name = sample.id
                return replace(self._prepare(sample), bad=tuple(bad))
            except (LocalShardError, OutsideError):
                raise
            except (HiveError, ValueError, IndexError) as error:  # IndexError: of a shard whose places are damaged
                bad.append(BadSample(name, str(error)))
        raise HiveError(f"{len(bad)} samples in a row cannot be used; the last, {bad[-1].id}: {bad[-1].reason}")

    def __iter__(self) -> Iterator[Any]:
        """Iterate over this worker's samples of the epoch; streaming's threads end when the iterator is dropped."""
        try:
            samples: Iterator[Any] = super().__iter__()
            yield from samples if self._train else map(self._once, count(), samples)
        finally:
            if hasattr(self, "_iterator") and not sys.is_finalizing():  # when streaming has ended them, and its names
                self._iterator.non_blocking_exit()

    def _once(self, number: int, sample: PreparedSample) -> PreparedSample:
        """This worker's sample ``number`` of a validation, without loss where it fills up or stands in for another."""
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        batch, within = divmod(number, self.micro_batch_size)
        place = ((batch * workers + own) * self.micro_batch_size + within) * self.world.size + self.world.rank
        if place >= self.held_out:
            return replace(sample, bad=()).without_loss()
        # A bad one after it has a place of its own.
        return replace(sample, bad=sample.bad[:1]).without_loss() if sample.bad else sample

    def seek(self, epoch: int, samples: int) -> None:
        """Let the next iteration start at sample ``samples`` (over all ranks) of ``epoch``.

        HiveError where that is within a global batch and batches are balanced: which samples are left is not known.
        """
        if self._sizes is not None and samples % self.global_batch_size:
            raise HiveError(
                f"data position at sample {samples} of the epoch: with data.balance expected a multiple of "
                f"global_batch_size {self.global_batch_size}"
            )
        self.next_epoch = epoch
        self.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": samples,
                "num_canonical_nodes": CANONICAL_NODES,
                "shuffle_seed": self.shuffle_seed,
            }
        )


@contextmanager
def _named_errors(weights: Mapping[str, float], cache_limit: str | None) -> Iterator[None]:
    """Say in one line what streaming cannot work with: a cache that is too small, or a remote folder."""
    try:
        yield
    except HiveError:
        raise
    except ValueError as error:
        if not cache_limit:
            raise
        raise HiveError(f"data.cache_limit {cache_limit}: {error}") from error
    except Exception as error:  # of whatever cloud
        raise HiveError(f"data folder {' or '.join(weights)}: the index cannot be read: {one_line(error)}") from error
