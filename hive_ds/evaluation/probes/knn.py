"""The kNN head: the nearest training images vote (DINO's protocol, arXiv 2104.14294). Axes: I image, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from hive_ds.errors import HiveError
from hive_ds.evaluation.probes.settings import KnnSettings

ROWS = 256
"""Test images whose similarities to all training images are in memory at once."""


def predict_knn(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, settings: KnnSettings
) -> tuple[Tensor, dict]:
    """(I,) classes of ``test``; HiveError where there are fewer training images than neighbours.

    The ``k`` training images of the largest cosine vote for their classes with exp(cosine / temperature).
    """
    if settings.k > len(train):
        raise HiveError(f"kNN probe: k is {settings.k}, expected at most the {len(train)} training images")
    train = torch.nn.functional.normalize(train, dim=-1)
    test = torch.nn.functional.normalize(test, dim=-1)
    predicted = []
    for rows in test.split(ROWS):
        cosine, nearest = (rows @ train.T).topk(settings.k, dim=-1)
        # The largest weight is taken as 1, so that a small temperature does not overflow.
        weights = ((cosine - cosine[:, :1]) / settings.temperature).exp()
        votes = torch.zeros(len(rows), num_classes, device=rows.device, dtype=weights.dtype)
        predicted.append(votes.scatter_add_(1, train_labels[nearest], weights).argmax(-1))
    return torch.cat(predicted), {}
