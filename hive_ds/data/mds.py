"""MDS shards: the one file that imports ``streaming`` (mosaicml-streaming).

Importing this module needs the extra; everything else in `hive_ds.data` imports it inside functions, so that
the rest of the package works without.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from hive_ds.data.batch import BadSample, PackedBatch, PreparedSample
from hive_ds.data.environment import find_world
from hive_ds.data.schema import MDS_COLUMNS, Sample, from_columns, to_columns
from hive_ds.errors import HiveError

find_world()  # streaming needs LOCAL_WORLD_SIZE, which the deepspeed launcher does not set

try:
    from streaming import LocalDataset, MDSWriter, StreamingDataLoader, StreamingDataset
except ImportError as error:
    raise HiveError(
        f"MDS shards need mosaicml-streaming ({error}): pip install 'hive-ds[streaming]' (it pins transformers < 5)"
    ) from error

logger = logging.getLogger(__name__)

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


def read_mds(folder: str | Path) -> list[Sample]:
    """Read all samples of a local folder of MDS shards, in order; HiveError where there is none."""
    if not (Path(folder) / "index.json").is_file():
        raise HiveError(f"MDS folder {folder}: holds no index.json")
    dataset = LocalDataset(str(folder))
    return [from_columns(dataset.get_item(index)) for index in range(len(dataset))]


CANONICAL_NODES = 1
"""Pinned, so that the order of samples does not depend on the machines. Every node reads every shard."""
SHUFFLE_BLOCK = 1 << 18
"""Samples within which py1e spreads a shard; streaming's default depends on the number of canonical nodes."""
BAD_GRACE = 100
"""The share of bad samples is taken of at least so many, so that one bad sample at the start does not end a run."""
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
        return folder, cache
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


class SampleLoader(StreamingDataLoader):
    """Packed batches of one rank, with a position that is saved and restored to the sample.

    With ``endless`` (training) iteration goes on over epochs and picks up at the position where the last one stopped;
    otherwise each iteration is the first epoch again. ``len()`` is the number of micro-batches of one epoch.
    Bad samples are logged and counted; past ``max_bad_share`` of the samples so far (of at least BAD_GRACE) a
    HiveError ends the run.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        *,
        collate_fn: Callable[[list[PreparedSample]], PackedBatch],
        num_workers: int,
        endless: bool,
        max_bad_share: float,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=dataset.batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            worker_init_fn=_start_worker,
        )
        self._samples = dataset
        self._endless = endless
        self._max_bad_share = max_bad_share
        self._epoch = 0
        self._start = 0
        self.num_seen = 0
        """Samples that this rank has yielded since it started, bad ones replaced."""
        self.num_bad = 0

    def __iter__(self) -> Iterator[PackedBatch]:  # type: ignore[override]
        """Yield batches; every rank yields equally many."""
        self._epoch, self._start = self._position() if self._endless else (0, 0)
        while True:
            self._samples.seek(self._epoch, self._start)
            try:
                for batch in super().__iter__():
                    self._count(batch)
                    yield batch
            except HiveError as error:
                # A worker's error arrives with its stack trace in the message: keep the line that says what is wrong.
                raise HiveError(str(error).strip().rsplit("HiveError: ", 1)[-1]) from error
            if not self._endless:
                return
            self._epoch, self._start, self.num_samples_yielded = self._epoch + 1, 0, 0

    def _position(self) -> tuple[int, int]:
        samples = self._start + self.num_samples_yielded * self._samples.world.size
        return (self._epoch + 1, 0) if samples == self._samples.epoch_size else (self._epoch, samples)

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last batch that was yielded: the same on every rank."""
        epoch, samples = self._position()
        return {"epoch": epoch, "samples": samples, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration at ``state``; HiveError where data, seed or global batch are others.

        The number of ranks, of workers and the micro-batch may differ from the run that saved it.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise HiveError(f"data position saved with {name} {state.get(name)}, but the run has {value}")
        self._epoch, self._start, self.num_samples_yielded = state["epoch"], state["samples"], 0

    def _identity(self) -> dict[str, int]:
        return {
            "num_samples": self._samples.num_samples,
            "global_batch_size": self._samples.global_batch_size,
            "seed": self._samples.shuffle_seed,
        }

    def _count(self, batch: PackedBatch) -> None:
        self.num_seen += batch.num_samples
        self.num_bad += len(batch.bad)
        for bad in batch.bad:
            logger.warning("bad sample %s replaced: %s", bad.id, bad.reason)
        if self.num_bad > self._max_bad_share * max(self.num_seen, BAD_GRACE):
            raise HiveError(
                f"{self.num_bad} bad samples among {self.num_seen} on this rank, more than data.max_bad_share = "
                f"{self._max_bad_share} allows; the last, {batch.bad[-1].id}: {batch.bad[-1].reason}"
            )

    def _get_batch_size(self, batch: PackedBatch) -> int:
        return batch.num_samples


def _start_worker(worker: int) -> None:
    """Let a worker end when its parent says so, and not at a signal meant for the parent.

    The launcher sends SIGTERM, and a terminal SIGINT, to workers too. Ignoring SIGTERM altogether would hang: torch
    and multiprocessing end a worker by it when nothing else reaches it. So a thread reads who sent it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_parents_word, args=(os.getppid(),), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_at_parents_word(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
