"""Balanced batches: the same samples in each global batch, shared out evenly."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader_shared_memory import dataset, loader
from tiny_data import make_samples

from hive_ds.data.mds import SampleDataset, write_mds
from hive_ds.data.mds.balance import balance_order
from hive_ds.data.mds.sizes import SIZES
from hive_ds.errors import HiveError

Array = np.ndarray


def make_order(nodes: int, ranks: int, workers: int, micro: int, steps: int, accumulation: int) -> Array:
    """Sample numbers as streaming deals them out: sample i to rank i modulo ranks, batches in turn to the workers."""
    all_ranks = nodes * ranks
    sequences = np.arange(steps * all_ranks * micro * accumulation).reshape(-1, nodes, ranks).transpose(1, 2, 0)
    lacking = -sequences.shape[2] % (workers * micro)
    sequences = np.pad(sequences, ((0, 0), (0, 0), (0, lacking)), constant_values=-1)
    return sequences.reshape(nodes, ranks, -1, workers, micro).transpose(0, 1, 3, 2, 4)


def batches_of(order: Array, accumulation: int) -> Array:
    """(steps, ranks, accumulation, micro) as the loaders of the ranks yield them."""
    nodes, ranks, _, _, micro = order.shape
    sequences = order.transpose(0, 1, 3, 2, 4).reshape(nodes * ranks, -1, micro)
    count = int((sequences[0, :, 0] >= 0).sum())
    return sequences[:, :count].reshape(nodes * ranks, -1, accumulation, micro).transpose(1, 0, 2, 3)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 6),
    seed=st.integers(0, 100),
    images=st.sampled_from([[0], [1], [0, 1], [0, 1, 5]]),
)
def test_every_global_batch_keeps_its_samples(shape: tuple[int, ...], seed: int, images: list[int]) -> None:
    nodes, ranks, _, micro, steps, accumulation = shape
    order, drawn = make_order(*shape), np.random.default_rng(seed)
    number = steps * nodes * ranks * micro * accumulation
    sizes = np.stack([drawn.integers(0, 1000, number), drawn.choice(images, number)], axis=1).astype(np.int32)
    before = batches_of(order.copy(), accumulation)
    balanced = balance_order(order.copy(), sizes, number // steps)
    assert balanced.shape == order.shape
    after = batches_of(balanced, accumulation)
    assert after.shape == before.shape
    assert [sorted(step.ravel()) for step in after] == [sorted(step.ravel()) for step in before]
    if max(images) == 1:  # then counts can be equal but for one
        counts = sizes[after, 1].sum(axis=-1)
        at_once = counts.max(axis=1) - counts.min(axis=1)
        assert at_once.max() <= 1
        assert np.ptp(counts.sum(axis=2), axis=1).max() <= 1 + accumulation // 2


def test_characters_are_spread_evenly_on_a_skewed_corpus() -> None:
    """A third of the texts are ten times as long, and seven of ten samples have an image."""
    drawn = np.random.default_rng(0)
    characters = drawn.integers(50, 400, 8192) * drawn.choice([1, 10], 8192, p=[0.67, 0.33])
    sizes = np.stack([characters, drawn.random(8192) < 0.7], axis=1).astype(np.int32)
    order = make_order(1, 8, 2, 8, 64, 2)

    def excess(loads: Array) -> float:
        """What the ranks wait for the slowest, as a share of the mean work; mean over all steps."""
        return float(((loads.max(axis=1) - loads.mean(axis=1)) / loads.mean(axis=1)).mean())

    balanced = balance_order(order.copy(), sizes, 128)
    before, after = (sizes[batches_of(array, 2), 0].sum(axis=3) for array in (order, balanced))
    assert excess(before) > 0.5
    assert excess(after) < 0.05  # micro-batches that run at once
    assert excess(before.sum(axis=2)) > 0.3
    assert excess(after.sum(axis=2)) < 0.03  # whole steps
    for part, most in ((0, 0.003), (1, 0.02)):  # no rank has the heaviest micro-batches of all steps
        of_rank = sizes[batches_of(balanced, 2), part].sum(axis=(0, 2, 3))
        assert np.abs(of_rank / of_rank.mean() - 1).max() < most


def balanced(folder: str, cache: Path) -> SampleDataset:
    return SampleDataset(
        {folder: 1.0},
        cache=str(cache),
        cache_limit=None,
        prepare=dataset(loader(str(folder).removeprefix("file://"), str(cache), 0))._prepare,
        micro_batch_size=2,
        global_batch_size=4,
        shuffle=True,
        seed=3,
        balance=True,
    )


def test_remote_sizes_are_fetched_and_missing_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_mds(make_samples(10), tmp_path / "data")
    data = balanced(f"file://{tmp_path / 'data'}", tmp_path / "cache")
    assert len({sample.id for sample in data}) == 10
    assert len(list((tmp_path / "cache").glob(f"*/{SIZES}"))) == 1
    data.seek(0, 4)
    with pytest.raises(HiveError, match=r"at sample 6 of the epoch: with data\.balance expected a multiple of .* 4"):
        data.seek(0, 6)
    (tmp_path / "data" / SIZES).unlink()
    for folder in (f"{tmp_path / 'data'}", f"file://{tmp_path / 'data'}"):
        with pytest.raises(HiveError, match=rf"holds no {SIZES}"):
            balanced(folder, tmp_path / "other")
