"""Packed batches of one rank, with a position to resume from."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from streaming import StreamingDataLoader

from hive_ds.data.batch import PackedBatch, PreparedSample
from hive_ds.data.mds.dataset import SampleDataset
from hive_ds.data.mds.shared_memory import release_caches
from hive_ds.errors import HiveError, OutsideError

logger = logging.getLogger(__name__)


class SampleLoader(StreamingDataLoader):
    """Packed batches of one rank, with a position that is saved and restored to the sample.

    With ``endless`` (training) iteration goes on over epochs and picks up at the position where the last one stopped;
    otherwise each iteration is the first epoch again. ``len()`` is the number of micro-batches of one epoch.
    Bad samples are logged. Whether they are too many (``max_bad_share``) is for those to say who know all ranks'
    samples: a single rank's first ones are too few. HiveError where nothing usable comes for so many in a row.
    Workers make at least ``queue`` batches ahead.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        *,
        collate_fn: Callable[[list[PreparedSample]], PackedBatch],
        num_workers: int,
        queue: int,
        endless: bool,
        max_bad_share: float,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=dataset.batch_size,
            num_workers=num_workers,
            prefetch_factor=-(-queue // num_workers) if num_workers else None,
            collate_fn=collate_fn,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if num_workers else None,  # Python 3.14's own way has another parent
            pin_memory=torch.cuda.is_available(),
        )
        self._samples = dataset
        self._endless = endless
        self.max_bad_share = max_bad_share
        self._epoch = 0
        self._start = 0

    def __iter__(self) -> Iterator[PackedBatch]:  # type: ignore[override]
        """Yield batches; every rank yields equally many."""
        self._epoch, self._start = self._position() if self._endless else (0, 0)
        while True:
            self._samples.seek(self._epoch, self._start)
            try:
                for batch in super().__iter__():
                    for bad in batch.bad:
                        logger.warning("bad sample %s replaced: %s", bad.id, bad.reason)
                    yield batch
            except HiveError as error:
                # A worker's error arrives with its stack trace in the message: keep the line that says what is wrong.
                kind, line = type(error), str(error).strip().rsplit("\n", 1)[-1]
                said = line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
                raise (OutsideError if isinstance(error, OutsideError) else HiveError)(said) from error
            if not self._endless:
                return
            self._epoch, self._start, self.num_samples_yielded = self._epoch + 1, 0, 0

    def first(self, count: int) -> Iterator[PackedBatch]:
        """Iterate over the first ``count`` samples, or all there are, each with its loss once on one rank.

        Of a loader that is not ``endless``. Every rank yields equally many batches: what fills them up, and what stands
        in for a bad sample, carries no loss.
        """
        self._samples.held_out = min(count, self.num_samples)
        at_once = self._samples.micro_batch_size * self._samples.world.size
        return islice(self, -(-self._samples.held_out // at_once))

    @property
    def num_samples(self) -> int:
        """Of all folders."""
        return int(self._samples.num_samples)

    def _position(self) -> tuple[int, int]:
        samples = self._start + self.num_samples_yielded * self._samples.world.size
        return (self._epoch + 1, 0) if samples == self._samples.epoch_size else (self._epoch, samples)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was yielded: the same on every rank."""
        epoch, samples = self._position()
        return {"epoch": epoch, "samples": samples, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration at ``state``; HiveError where data, their weights, order or global batch are others.

        The number of ranks, of workers and the micro-batch may differ from the run that saved it.
        """
        for name, value in self._identity().items():
            if (saved := state.get(name)) != value:
                raise HiveError(f"data position saved with {name} {saved}, but the run has {value}")
        self._epoch, self._start, self.num_samples_yielded = state["epoch"], state["samples"], 0

    def _identity(self) -> dict[str, Any]:
        weights = self._samples.weights
        return {
            "num_samples": self._samples.num_samples,
            "global_batch_size": self._samples.global_batch_size,
            "seed": self._samples.shuffle_seed,
            "shuffle": self._samples.shuffle,
            # One folder may be moved between two runs; which of several a sample came from depends on all of these.
            "weights": weights if len(weights) > 1 else None,
        }

    def close(self) -> None:
        """End what this process still downloads, and let another loader download to the cache; for one without workers.

        It cannot be iterated again.
        """
        samples = self._samples
        if hasattr(samples, "_iterator"):
            samples._iterator.non_blocking_exit()
            samples._executor.shutdown()  # not `_iterator.exit`, which waits for ever for a thread that has failed
        if samples._unique_rank_world.is_local_leader:
            release_caches(os.getpid(), samples._shm_prefix_int)

    def _get_batch_size(self, batch: PackedBatch) -> int:
        return batch.num_samples


def _start_worker(worker: int) -> None:
    """Let a worker, forked from its loader's process, end when that says so, and not at a signal meant for that.

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
