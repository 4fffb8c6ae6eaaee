"""``micro_batch_size: auto``: the largest micro-batch that fits, found by steps of the engine that will train.

A trial is an optimizer step of two micro-batches at a rate of 0, which changes no weight. They repeat one sample: of
the data's first, the one with the most image data, its text as long as `DataConfig.max_length` allows. Sizes are tried
from small to large, each only if the two before it predict that it fits (activations grow linearly with the samples): a
rank that runs out of memory in the middle of a step leaves the others waiting. All ranks decide alike, by the fullest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hive_ds.config import Recipe
from hive_ds.data.batch import PackedBatch, stretched
from hive_ds.data.loader import build_loader
from hive_ds.errors import HiveError
from hive_ds.files import write_whole
from hive_ds.processing import HiveProcessor
from hive_ds.training.device_memory import DeviceMemory, device_memory
from hive_ds.training.distributed import from_main, min_over_ranks
from hive_ds.training.engine import Engine
from hive_ds.training.global_batch import micro_batches
from hive_ds.training.loop import run_micro_batches
from hive_ds.training.origin import describe_origin
from hive_ds.training.random_state import random_state, restore_random_state
from hive_ds.training.run_folder import StageFolder

if TYPE_CHECKING:
    from hive_ds.data.mds import SampleLoader

LIMIT = 0.9
"""Share of a device's memory that a step may fill: the rest is for fragments, which no trial shows."""
SAMPLES = 32
"""Of each rank, among which the costliest is looked for."""


@dataclass(frozen=True)
class Trial:
    """Memory that a step took on the fullest rank, as shares of its device's."""

    size: int
    """Samples of a micro-batch."""
    resting: float
    """Before the step."""
    passes: float
    """At the peak of forward and backward."""
    step: float
    """At the peak of the optimizer's step."""

    @property
    def peak(self) -> float:
        """Of all."""
        return max(self.passes, self.step)


@dataclass(frozen=True)
class Search:
    """What was tried, in order of size, and the first size that was predicted not to fit, with its peak."""

    trials: list[Trial]
    refused: tuple[int, float] | None

    def largest(self, sizes: Sequence[int]) -> Trial | None:
        """The largest of ``sizes`` that fitted, if one did."""
        return max(
            (one for one in self.trials if one.size in sizes and one.peak <= LIMIT),
            key=lambda one: one.size,
            default=None,
        )


def auto_micro_batch(
    engine: Engine,
    recipe: Recipe,
    folder: StageFolder,
    processor: HiveProcessor,
    say: Callable[[str], None],
) -> int:
    """The largest micro-batch that fits, or what an earlier start on the same ranks and devices has found.

    Args:
        engine: of the stage, before its first step.
        recipe: of the run.
        folder: of the stage; what is found is written to it.
        processor: of the model.
        say: prints on rank 0.

    Raises:
        HiveError: not even a micro-batch of 1 fits, or the data cannot be read.
    """
    stage, world = folder.stage.name, engine.world
    sizes = micro_batches(recipe.stages[stage], world.size)
    memory = device_memory(engine.device, world.local_size)
    smallest = int(min_over_ranks([memory.total], engine.device)[0])
    setting = {"ranks": world.size, "device": memory.name, "bytes": smallest, **describe_origin(recipe)}
    known = from_main(_recall(folder.micro_batch, setting, sizes))
    if known is not None:
        say(f"micro-batch auto: {known}, found by an earlier start of this run ({folder.micro_batch})")
        return known
    loader = _sample_loader(recipe, stage, processor, world.size)
    sample = costliest(loader)
    loader.close()  # training downloads to the same cache
    length = recipe.data_of(stage).max_length
    found = find_micro_batch(engine, sizes, partial(stretched, sample, length), memory)
    chosen = found.largest(sizes)
    if chosen is None:
        raise HiveError(
            f"stages.{stage}.micro_batch_size auto: a micro-batch of 1 takes {found.trials[0].peak:.0%} of the fullest"
            f" device's memory with a text of {length} tokens; expected at most {LIMIT:.0%}: shorten data.max_length,"
            " set model.gradient_checkpointing, take another training.ds_config or more ranks, or write a number"
        )
    say(describe(found, sizes))
    if world.is_main:
        write_whole(folder.micro_batch, _as_record(found, chosen.size, setting))
    return chosen.size


def search(sizes: Sequence[int], try_size: Callable[[int], Trial]) -> Search:
    """Try ``sizes``, and 2 where there are larger ones, from small to large up to the first that does not fit."""
    trials: list[Trial] = []
    for size in sorted({*sizes, min(2, max(sizes))}):
        predicted = _predict(trials, size)
        if predicted > LIMIT:
            return Search(trials, (size, predicted))
        trials.append(try_size(size))
        if trials[-1].peak > LIMIT:
            break
    return Search(trials, None)


def _predict(trials: Sequence[Trial], size: int) -> float:
    """Peak of ``size``, on the line through the last two; 0 before the first."""
    if not trials:
        return 0.0
    last = trials[-1]
    # After one trial the line starts at rest, which is too steep: it also counts what every size takes.
    size_before, passes_before = (trials[-2].size, trials[-2].passes) if len(trials) > 1 else (0, last.resting)
    slope = (last.passes - passes_before) / (last.size - size_before)
    return max(last.step, last.passes + slope * (size - last.size))


def try_step(engine: Engine, batch: PackedBatch, memory: DeviceMemory) -> Trial:
    """One optimizer step of two micro-batches, on every rank, at a rate of 0."""
    resting = memory.used()
    memory.forget_peak()
    run_micro_batches(engine, [batch, batch], 2 * batch.supervised_tokens * engine.world.size)
    passes = memory.peak()
    memory.forget_peak()
    engine.step(0.0)
    own = [-taken / memory.total for taken in (resting, passes, memory.peak())]
    fullest = [-share for share in min_over_ranks(own, engine.device)]
    return Trial(batch.num_samples, *fullest)


def find_micro_batch(
    engine: Engine, sizes: Sequence[int], batch_of: Callable[[int], PackedBatch], memory: DeviceMemory
) -> Search:
    """Try ``sizes`` on ``engine``, whose weights, optimizer and random state are as before; every rank calls it.

    Args:
        engine: that has not made a step.
        sizes: that may be chosen.
        batch_of: the costliest micro-batch of a number of samples.
        memory: of this rank's device.
    """
    before = random_state()
    try_step(engine, batch_of(1), memory)  # not counted: it makes AdamW's state and what libraries keep
    found = search(sizes, lambda size: try_step(engine, batch_of(size), memory))
    engine.forget_steps()
    restore_random_state(before)
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def costliest(batches: Iterable[PackedBatch]) -> PackedBatch:
    """Of the first batches, of one sample each, the one with the most image data."""
    return max(islice(batches, SAMPLES), key=lambda batch: sum(value.numel() for value in batch.images.values()))


def describe(found: Search, sizes: Sequence[int]) -> str:
    """One line: what was chosen, and why nothing larger."""
    chosen = found.largest(sizes)
    assert chosen is not None
    said = f"micro-batch auto: {chosen.size}, which takes {chosen.peak:.0%} of the fullest device's memory at its peak"
    if found.refused is not None:
        size, peak = found.refused
        return f"{said}; {size} would take {peak:.0%} (predicted), and {LIMIT:.0%} may be filled"
    if chosen.size == max(sizes):
        return f"{said}; it is a rank's whole share of a step"
    last = found.trials[-1]
    return f"{said}; {last.size} takes {last.peak:.0%}, and {LIMIT:.0%} may be filled"


def _sample_loader(recipe: Recipe, stage: str, processor: HiveProcessor, ranks: int) -> SampleLoader:
    """The training data one by one, in the order of their folders."""
    data = replace(recipe.data_of(stage), num_workers=0)
    return build_loader(
        data,
        processor.tokenizer,
        processor.image_processor,
        micro_batch_size=1,
        global_batch_size=ranks,
        seed=recipe.training.seed,
        train=False,
        folder=data.train,
    )


def _recall(record: Path, setting: dict[str, Any], sizes: Sequence[int]) -> int | None:
    """What an earlier start of this run has found; None where there was none, or what it depends on differs."""
    try:
        written = json.loads(record.read_text())
        return sizes[sizes.index(written["micro_batch_size"])] if written["setting"] == setting else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_record(found: Search, size: int, setting: dict[str, Any]) -> str:
    """What `_recall` reads, with what was measured beside it."""
    trials = [{**asdict(one), "peak": one.peak} for one in found.trials]
    return json.dumps({"micro_batch_size": size, "limit": LIMIT, "trials": trials, "setting": setting}, indent=1) + "\n"
