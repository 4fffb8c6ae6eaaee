"""The attentive head of the paper: LayerNorm, one learned query, multi-head attention, linear.

AdamW at the paper's values; its learning-rate schedule is not published, ours is a cosine to 0 without warm-up.
Axes: B image, P patch token, D width, C class.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from hive_ds.evaluation.probes.cache import Features
from hive_ds.evaluation.probes.data import Split
from hive_ds.evaluation.probes.settings import AttentiveSettings

QUERY_STD = 0.02
"""Of the query's first values, as Vision Transformers start their class token."""


class AttentiveHead(nn.Module):
    """Pools patch tokens by attention of one query, and classifies."""

    def __init__(self, width: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * QUERY_STD)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, tokens_BPD: Tensor, padding_BP: Tensor | None = None) -> Tensor:
        """(B, C) logits; ``padding_BP`` is True where a token is none."""
        tokens = self.norm(tokens_BPD)
        query = self.query.expand(len(tokens), -1, -1)
        pooled, _ = self.attention(query, tokens, tokens, key_padding_mask=padding_BP, need_weights=False)
        return self.classifier(pooled[:, 0])


def predict_attentive(
    train: Features,
    test: Features,
    split: Split,
    num_classes: int,
    settings: AttentiveSettings,
    *,
    num_heads: int,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, dict]:
    """(I,) classes of the test rows after training on the training rows, and the last epoch's mean loss.

    Features are read batch by batch, so mapped files of any size will do. The seed sets start and order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AttentiveHead(train.values.shape[-1], num_heads, num_classes)
    head = head.to(device)
    loss = _train(head, train, split, settings, seed, device)
    head.eval()
    predicted = []
    with torch.no_grad():
        for rows in np.split(split.test_rows, range(settings.batch_size, len(split.test_rows), settings.batch_size)):
            predicted.append(head(*_read(test, rows, device)).argmax(-1))
    return torch.cat(predicted), {"loss": loss}


def _train(
    head: AttentiveHead, train: Features, split: Split, settings: AttentiveSettings, seed: int, device: torch.device
) -> float:
    """Train ``head`` and return the last epoch's mean loss."""
    decayed = [parameter for parameter in head.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in head.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    size = len(split.train_rows)
    batches = -(-size // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    generator = np.random.default_rng(seed)
    total = 0.0
    for _ in range(settings.epochs):
        total = 0.0
        for chosen in np.array_split(generator.permutation(size), batches):
            labels = torch.from_numpy(split.train_labels[chosen]).to(device)
            loss = nn.functional.cross_entropy(head(*_read(train, split.train_rows[chosen], device)), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
    return total / size


def _read(features: Features, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, P, D) in float32 of some rows, and where they are padding."""
    tokens = torch.from_numpy(features.values[rows].astype(np.float32)).to(device)
    if features.counts is None:
        return tokens, None
    counts = torch.from_numpy(features.counts[rows]).to(device)
    padding = torch.arange(tokens.shape[1], device=device) >= counts[:, None]
    return tokens, padding if bool(padding.any()) else None
