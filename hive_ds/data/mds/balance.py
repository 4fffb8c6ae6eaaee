"""Orders of an epoch other than streaming's: each global batch dealt by load, and each sample once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hive_ds.data.mds.sizes import Sizes

Order = npt.NDArray[np.int64]
CHUNK = 4096
"""Global batches that are dealt at a time: bounds the memory on large data sets."""
IMAGE = 1 << 40
"""What an image counts in characters when cells are compared: more than any text, so that images come first."""


def each_once(order: Order, samples: int) -> Order:
    """Samples 0 to ``samples`` - 1 one after another, dealt to the ranks in turn; the last again where some lack.

    Args:
        order: streaming's array, as in `balance_order`, of a whole epoch.
        samples: of all folders.
    """
    nodes, ranks, workers, batches, micro = order.shape
    sequences = order.transpose(0, 1, 3, 2, 4).reshape(nodes * ranks, -1)
    length = int((sequences[0] >= 0).sum())
    places = np.arange(length * len(sequences)).reshape(length, -1).T
    sequences[:, :length] = np.minimum(places, samples - 1)
    return sequences.reshape(nodes, ranks, batches, workers, micro).transpose(0, 1, 3, 2, 4)


def balance_order(order: Order, sizes: Sizes, global_batch_size: int) -> Order:
    """Deal each global batch anew; which samples it holds stays the same.

    ``order`` is streaming's array (nodes, ranks, workers, batches of a worker, samples of a batch) from a whole global
    batch on, with -1 at the end of each rank where batches are lacking; ``sizes`` is `read_sizes`. Every micro-batch
    of every rank keeps its number of samples. Images are shared out first, then characters; micro-batches that the
    ranks run at the same time are made alike, for the ranks wait for each other.
    """
    nodes, ranks, workers, batches, micro = order.shape
    sequences = order.transpose(0, 1, 3, 2, 4).reshape(nodes * ranks, -1)
    length = int((sequences[0] >= 0).sum())
    per_rank = global_batch_size // len(sequences)
    steps = sequences[:, :length].reshape(len(sequences), -1, per_rank).transpose(1, 0, 2)
    for start in range(0, len(steps), CHUNK):
        part = steps[start : start + CHUNK]
        dealt = _deal(part.reshape(len(part), -1), sizes, len(sequences), micro)
        sequences[:, start * per_rank : (start + len(part)) * per_rank] = dealt
    return sequences.reshape(nodes, ranks, batches, workers, micro).transpose(0, 1, 3, 2, 4)


def _deal(samples: Order, sizes: Sizes, ranks: int, micro: int) -> Order:
    """(steps, global batch) samples -> (ranks, steps * samples of a rank)."""
    size = sizes[samples].astype(np.int64)  # (steps, global batch, 2)
    cells = _share_out(size, micro)
    _swap(cells, size)
    rows = np.arange(len(samples))[:, None]
    # (steps, micro-batches of all ranks, 2)
    load = size[rows[..., None], cells].sum(axis=2)
    heaviest_first = np.argsort(-(load[..., 1] * IMAGE + load[..., 0]), axis=1, kind="stable")
    dealt = samples[rows[..., None], cells[rows, heaviest_first]]
    together = dealt.reshape(len(samples), -1, ranks, micro)
    together[:, 1::2] = together[:, 1::2, ::-1].copy()  # or rank 0 would always have the heaviest
    return together.transpose(2, 0, 1, 3).reshape(ranks, -1)


def _share_out(size: Order, micro: int) -> Order:
    """Greedily: the largest sample left goes to the cell with the least, as long as that has room.

    (steps, global batch, 2) sizes -> (steps, cells, micro) places in the global batch; a cell is a micro-batch.
    """
    steps, number, _ = size.shape
    rows = np.arange(steps)
    largest_first = np.lexsort((-size[..., 0], -size[..., 1]), axis=1)
    characters, images, filled = np.zeros((3, steps, number // micro), np.int64)
    cells = np.empty((steps, number // micro, micro), np.int64)
    for turn in range(number):
        at = largest_first[:, turn]
        shown = size[rows, at, 1]
        load = characters + np.where(shown[:, None] > 0, images * IMAGE, 0)
        cell = np.where(filled < micro, load, np.iinfo(np.int64).max).argmin(axis=1)
        cells[rows, cell, filled[rows, cell]] = at
        filled[rows, cell] += 1
        characters[rows, cell] += size[rows, at, 0]
        images[rows, cell] += shown
    return cells


def _swap(cells: Order, size: Order) -> None:
    """Swap samples of as many images between the cell with the most and the one with the least characters, in place.

    Sharing out images first leaves long texts for the end, when few cells have room.
    """
    steps, count, micro = cells.shape
    rows = np.arange(steps)
    for _ in range(2 * count):
        own = size[rows[:, None, None], cells]  # (steps, cells, micro, 2)
        load = own[..., 0].sum(axis=2)
        most, least = load.argmax(axis=1), load.argmin(axis=1)
        gap = (load[rows, most] - load[rows, least])[:, None, None]
        heavy, light = own[rows, most], own[rows, least]
        moved = heavy[:, :, None, 0] - light[:, None, :, 0]
        useful = (heavy[:, :, None, 1] == light[:, None, :, 1]) & (moved > 0) & (moved < gap)
        miss = np.where(useful, abs(2 * moved - gap), np.iinfo(np.int64).max).reshape(steps, -1)
        best = miss.argmin(axis=1)
        done = np.flatnonzero(useful.reshape(steps, -1)[rows, best])
        if not len(done):
            return
        first, second = (done, most[done], best[done] // micro), (done, least[done], best[done] % micro)
        cells[first], cells[second] = cells[second], cells[first].copy()
