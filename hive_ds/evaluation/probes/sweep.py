"""Probe a frozen encoder: features of all blocks in one pass, then a head for every task, block and seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hive_ds.evaluation.probes.attentive import predict_attentive
from hive_ds.evaluation.probes.cache import FeatureCache, Features
from hive_ds.evaluation.probes.data import ProbeData, Split, Task
from hive_ds.evaluation.probes.encoder import ProbeEncoder
from hive_ds.evaluation.probes.features import DEFAULT, ExtractSettings, Kind, compute_features
from hive_ds.evaluation.probes.knn import predict_knn
from hive_ds.evaluation.probes.linear import predict_linear
from hive_ds.evaluation.probes.results import BlockResult, Score
from hive_ds.evaluation.probes.settings import AttentiveSettings, KnnSettings, LinearSettings, ProbeSettings


def probe(
    encoder: ProbeEncoder,
    data: ProbeData,
    settings: ProbeSettings,
    *,
    extract: ExtractSettings = DEFAULT,
    cache: FeatureCache | None = None,
) -> list[BlockResult]:
    """Results of every task of ``data`` at every block asked for.

    Where no seed could change a result (kNN, or a linear head with its ``l2`` given, on given test images) only the
    first is run.

    Args:
        encoder: of `load_encoder` or `make_encoder`.
        data: images, with labels for each task.
        settings: head, blocks and seeds.
        extract: how features are computed.
        cache: where features are kept; None: they are not.

    Raises:
        HiveError: the data cannot be probed, an image cannot be read, or a block is not there.
    """
    tasks = data.tasks()
    splits = {task.name: [data.split(task, seed) for seed in _seeds(data, settings)] for task in tasks}
    blocks = settings.blocks_of(encoder.info.num_blocks)
    kind: Kind = "tokens" if isinstance(settings.head, AttentiveSettings) else "mean"
    train = compute_features(encoder, data.train, blocks, kind, extract, cache)
    test = train if data.test is None else compute_features(encoder, data.test, blocks, kind, extract, cache)
    runs = tqdm(
        total=len(tasks) * len(blocks) * len(_seeds(data, settings)),
        desc=f"{encoder.info.name}: {settings.head_name}",
        unit="head",
        disable=not extract.progress,
    )
    with runs:
        return [
            _result(encoder, task, block, splits[task.name], (train[block], test[block]), settings, runs)
            for task in tasks
            for block in blocks
        ]


def _seeds(data: ProbeData, settings: ProbeSettings) -> tuple[int, ...]:
    head = settings.head
    fixed = isinstance(head, KnnSettings) or (isinstance(head, LinearSettings) and head.l2 is not None)
    return settings.seeds[:1] if fixed and data.test is not None else settings.seeds


def _result(
    encoder: ProbeEncoder,
    task: Task,
    block: int,
    splits: list[Split],
    features: tuple[Features, Features],
    settings: ProbeSettings,
    runs: tqdm,
) -> BlockResult:
    scores = []
    for seed, split in zip(settings.seeds, splits, strict=False):  # fewer splits where no seed changes anything
        predicted, fit = _predict(encoder, features, split, len(task.classes), settings, seed)
        scores.append(Score.of(seed, predicted.cpu().numpy(), split.test_labels, fit))
        runs.update()
    sizes = (len(splits[0].train_rows), len(splits[0].test_rows))
    return BlockResult(encoder.info.name, task.name, block, len(task.classes), *sizes, tuple(scores))


def _predict(
    encoder: ProbeEncoder,
    features: tuple[Features, Features],
    split: Split,
    num_classes: int,
    settings: ProbeSettings,
    seed: int,
) -> tuple[Tensor, dict]:
    head, device = settings.head, encoder.tower.device
    if isinstance(head, AttentiveSettings):
        heads = encoder.tower.config.num_attention_heads
        return predict_attentive(*features, split, num_classes, head, num_heads=heads, seed=seed, device=device)
    train, test = (
        torch.from_numpy(one.values[rows].astype(np.float32)).to(device)
        for one, rows in zip(features, (split.train_rows, split.test_rows), strict=True)
    )
    labels = torch.from_numpy(split.train_labels).to(device)
    if isinstance(head, KnnSettings):
        return predict_knn(train, labels, test, num_classes, head)
    return predict_linear(train, labels, test, num_classes, head, seed)
