"""What ranks tell one another in a step, in one message; and the data of the next step, which is part of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import record_function

from hive_ds.kernels import to_device
from hive_ds.training.attempt import Agreement
from hive_ds.training.distributed import sum_over_ranks
from hive_ds.training.flops import BatchSize
from hive_ds.training.metrics import Totals
from hive_ds.training.place import here

if TYPE_CHECKING:
    from hive_ds.training.loop import Job


@dataclass(frozen=True)
class Fetched:
    """The data of one step, on this rank."""

    micro_batches: list[Any]
    own: Totals
    """Sums over this rank's micro-batches."""
    position: dict[str, Any]
    """Of the loader, before them."""


@dataclass(frozen=True)
class Sums:
    """What ranks tell one another in a step, in one message; the same on every rank."""

    loss: float
    """Mean over all supervised tokens of the step."""
    squares: list[float]
    """Squared gradient norm of each module group."""
    ahead: Totals
    """Of the next step's data."""
    agreed: Agreement


def fetch(job: Job, batches: Iterator[Any]) -> Fetched:
    """Wait for the micro-batches of a step, the next ones of ``batches``, and count what they hold."""
    here.enter("data", ())
    position = job.loader.state_dict()
    start = time.perf_counter()
    with record_function("part:data"):
        micro_batches = [next(batches) for _ in range(job.engine.accumulation)]
    own = Totals(wait=time.perf_counter() - start)
    job.pace.add(own.wait)
    for batch in micro_batches:
        size = batch_size(batch, job.patch_size)
        own.add(
            Totals(
                supervised=size.supervised_tokens,
                tokens=size.text_tokens,
                images=batch.num_images,
                samples=batch.num_samples,
                cut=batch.num_cut,
                bad=len(batch.bad),
                flops=job.flops.count(size),
            )
        )
    return Fetched(micro_batches, own, position)


def add_up(job: Job, loss: Tensor, ahead: Fetched | None) -> Sums:
    """Ask all ranks, once a step: the one time that the loop waits for its GPU."""
    squares = job.engine.gradient_squares()
    totals = (Totals() if ahead is None else ahead.own).vector()
    words = torch.tensor([*totals, *job.attempt.word(writing=job.checkpoints.writing)], dtype=torch.float64)
    said = sum_over_ranks(torch.cat([loss.double()[None], squares, to_device(words, job.device)]), job.device)
    behind = 1 + len(squares)
    return Sums(
        loss=said[0] / job.world.size,
        squares=said[1:behind],
        ahead=Totals(*said[behind : behind + len(totals)]),
        agreed=job.attempt.agree(said[behind + len(totals) :]),
    )


def batch_size(batch: Any, patch_size: int) -> BatchSize:
    """What a `PackedBatch` asks of the model."""
    images = batch.images
    if "spatial_shapes" in images:
        patches = images["spatial_shapes"].prod(dim=1).tolist()
    else:
        count, _, height, width = images["pixel_values"].shape
        patches = [(height // patch_size) * (width // patch_size)] * count
    return BatchSize.of(batch.text_lengths, batch.image_offsets, batch.supervised_tokens, patches)
