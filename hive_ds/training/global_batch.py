"""How the samples of a step are shared out: over ranks, and over the micro-batches of each."""

from __future__ import annotations

from dataclasses import replace

from hive_ds.config import StageConfig
from hive_ds.errors import HiveError


def fit_micro_batch(config: StageConfig, num_ranks: int) -> StageConfig:
    """The stage's numbers with the largest micro-batch, up to the recipe's, that divides a rank's share of a step.

    The weights do not depend on the micro-batch (`hive_ds.training.loop.run_micro_batches`): a recipe's is a bound on
    memory, and its global batch holds on any number of ranks that divides it. ``auto`` is no bound: the whole share.

    Raises:
        HiveError: the ranks do not divide the global batch; the message says which numbers do.
    """
    return replace(config, micro_batch_size=micro_batches(config, num_ranks)[-1])


def micro_batches(config: StageConfig, num_ranks: int) -> list[int]:
    """Every micro-batch, up to the recipe's, that divides a rank's share of a step; ascending.

    Raises:
        HiveError: the ranks do not divide the global batch; the message says which numbers do.
    """
    total = config.global_batch_size
    if total % num_ranks:
        divisors = ", ".join(str(number) for number in range(1, total + 1) if total % number == 0)
        raise HiveError(
            f"global_batch_size {total} is not divisible by {num_ranks} ranks; these rank counts divide it: {divisors}"
        )
    share = total // num_ranks
    largest = share if config.micro_batch_size == "auto" else min(config.micro_batch, share)
    return [size for size in range(1, largest + 1) if share % size == 0]


def describe_batch(config: StageConfig, num_ranks: int, largest_micro_batch: int) -> str:
    """One line: how a step's samples are shared out, and why the micro-batch is not the recipe's where it is not."""
    micro, share = config.micro_batch, config.global_batch_size // num_ranks
    smaller = f", for {largest_micro_batch} does not divide {share}" if micro < largest_micro_batch else ""
    return (
        f"batch: {config.global_batch_size} samples a step over {num_ranks} ranks, "
        f"each {share // micro} x micro-batch {micro}{smaller}"
    )
