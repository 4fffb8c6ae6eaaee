"""What a probe is told: which head, its values, blocks and seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hive_ds.checks import check_seeds
from hive_ds.errors import HiveError

HEADS = ("linear", "attentive", "knn")
NAMED_BLOCKS = ("all", "last", "penultimate")


@dataclass(frozen=True)
class LinearSettings:
    """``l2`` weighs half the squared weights against the mean cross-entropy; None: each seed chooses it."""

    l2: float | None = None
    max_steps: int = 1000


@dataclass(frozen=True)
class AttentiveSettings:
    """The paper's values (Food-101 and Caltech-256: 5 epochs, ImageNet-1k: 1)."""

    epochs: int = 5
    batch_size: int = 512
    lr: float = 2e-4
    weight_decay: float = 0.01
    clip: float = 3.0


@dataclass(frozen=True)
class KnnSettings:
    """DINO's protocol: cosine, votes weighed by exp(similarity / temperature)."""

    k: int = 20
    temperature: float = 0.07


HeadSettings = LinearSettings | AttentiveSettings | KnnSettings


@dataclass(frozen=True)
class ProbeSettings:
    """A head on some blocks, once a seed.

    ``blocks`` are numbers from 1, or ``all``, ``last`` or ``penultimate``, which fit encoders of any depth.
    Penultimate, "the last block removed", is the paper's.
    """

    head: HeadSettings
    blocks: str | tuple[int, ...] = "penultimate"
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name, value in vars(self.head).items():
            if value is not None and name != "weight_decay" and not 0 < value < math.inf:  # NaN is not
                raise HiveError(f"{self.head_name} probe: {name} is {value}, expected a number above 0")
        check_seeds(self.seeds)
        if isinstance(self.blocks, str) and self.blocks not in NAMED_BLOCKS:
            raise HiveError(f"blocks {self.blocks!r}: expected numbers or one of {', '.join(NAMED_BLOCKS)}")
        if not self.blocks:
            raise HiveError("blocks: expected at least one")

    @property
    def head_name(self) -> str:
        """One of `HEADS`."""
        return dict(zip((LinearSettings, AttentiveSettings, KnnSettings), HEADS, strict=True))[type(self.head)]

    def blocks_of(self, num_blocks: int) -> tuple[int, ...]:
        """The blocks, in order, of an encoder with so many."""
        if isinstance(self.blocks, str):
            named = {"last": num_blocks, "penultimate": max(num_blocks - 1, 1)}
            return tuple(range(1, num_blocks + 1)) if self.blocks == "all" else (named[self.blocks],)
        return tuple(sorted(set(self.blocks)))
