"""A tiny HIVE model under an engine, and packed batches made by hand, for checks that run on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import IMAGE_SIZE, VOCABULARY, tiny_cascaded, tiny_hive

from hive_ds.config import StageConfig, TrainingConfig
from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.batch import PackedBatch
from hive_ds.errors import HiveError
from hive_ds.stages import Stage, stage_by_number
from hive_ds.training.distributed import from_main, sum_over_ranks
from hive_ds.training.ds_config import build_ds_config, read_policy
from hive_ds.training.engine import Engine, StepReport
from hive_ds.training.groups import StagePlan, groups_of, plan_stage
from hive_ds.training.loop import run_micro_batches

GLOBAL_BATCH = 4
COMBINATIONS = (
    *((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")),
    *(("zero3_offload_param", "bf16"), ("zero3_hpz", "fp32")),
)
"""ZeRO stages or policies, and precisions: every code path of DeepSpeed once."""
FEW = 5000
"""Elements that ZeRO-3 may gather ahead of need or keep for later, where the tiny model stands for a large one: part of
a layer."""
CONFIG = StageConfig(lr=2e-3, global_batch_size=GLOBAL_BATCH, micro_batch_size=1, weight_decay=0.1, clip=1.0)

Drawn = tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor]
"""input_ids, labels, image offsets, images of one sample."""


@dataclass(frozen=True)
class Trainee:
    """A model under an engine, with the plan of its stage."""

    engine: Engine
    plan: StagePlan


def make_model(stage: Stage, **changes: Any) -> Any:
    """A tiny HIVE model as a stage starts it."""
    return tiny_hive(image_kv=stage.image_kv, qk_norm="pre_rope", **changes).train()


def make_cascaded(**changes: Any) -> Any:
    """A tiny cascaded model, as any of its stages starts it."""
    return tiny_cascaded(**changes).train()


def scrambled(model: Any, stage: Stage) -> Any:
    """``model`` with other weights wherever ``stage`` trains: what it goes on with must come from a checkpoint."""
    plan_stage(model, stage, groups_of(model), CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    return model


def make_trainee(ranks: Any, *, stage: int | Stage = 2, model: Any = None, **options: Any) -> Trainee:
    """Put a tiny model under an engine; ``options`` are those of `put_under_engine`.

    On ranks other than 0 its weights are NaN: those of rank 0 must come in their place.
    """
    stage = stage_by_number(stage) if isinstance(stage, int) else stage
    model = make_model(stage) if model is None else model
    for parameter in [] if ranks.world.is_main else model.parameters():
        parameter.data.fill_(torch.nan)
    return put_under_engine(ranks, model, stage, **options)


def put_under_engine(
    ranks: Any,
    model: Any,
    stage: Stage,
    *,
    zero: int | str = 3,
    precision: str = "fp32",
    config: StageConfig = CONFIG,
    folder: Path | None = None,
    tensorboard: bool = False,
) -> Trainee:
    """Plan a stage of a model and put it under an engine; ``zero`` is a ZeRO stage or the name of a policy.

    By number, ZeRO-3 gathers the model layer by layer, as it does a large one; by name, all that follows at once.
    """
    plan = plan_stage(model, stage, groups_of(model), config)
    policy = read_policy(zero if isinstance(zero, str) else f"zero{zero}")
    if zero == 3:
        policy["zero_optimization"] |= {"stage3_prefetch_bucket_size": FEW, "stage3_max_reuse_distance": FEW}
    ds_config = build_ds_config(
        policy,
        config,
        TrainingConfig(precision=precision, tensorboard=tensorboard),
        num_ranks=ranks.world.size,
        log_folder=folder or ranks.folder,
        job="test",
    )
    return Trainee(Engine(model, plan.groups, ds_config, config, world=ranks.world, device=ranks.device), plan)


def draw_sample(seed: int, images: int = 1) -> Drawn:
    """A text of random length with random offsets; sample 0 mod 3 supervises a single token."""
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(4, 12, (), generator=generator))
    ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
    labels = ids.clone()
    labels[: (length - 1 if seed % 3 == 0 else 2)] = IGNORE_INDEX
    offsets = sorted(int(torch.randint(0, length, (), generator=generator)) for _ in range(images))
    pixels = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return ids, labels, offsets, pixels


def pack(samples: Sequence[Drawn], first_id: int = 0) -> PackedBatch:
    """Samples end to end; a batch without images carries the dummy that the loader would give it."""
    offsets = [list(sample[2]) for sample in samples]
    images = [sample[3] for sample in samples if len(sample[2])]
    count = sum(len(one) for one in offsets)
    lengths = [len(sample[0]) for sample in samples]
    if not count:
        offsets[0], images = [lengths[0]], [torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)]
    return PackedBatch(
        input_ids=torch.cat([sample[0] for sample in samples]),
        labels=torch.cat([sample[1] for sample in samples]),
        text_lengths=lengths,
        image_offsets=offsets,
        images={"pixel_values": torch.cat(images)},
        sample_ids=[f"s{first_id + index}" for index in range(len(samples))],
        num_images=count,
    )


def step_batches(ranks: Any, step: int, micro: int, images: Sequence[int] = (1, 1, 1, 1)) -> list[PackedBatch]:
    """This rank's micro-batches of a step: rank r takes every world-size-th group of ``micro`` samples, in order.

    Args:
        ranks: who asks.
        step: seeds the samples.
        micro: samples of a micro-batch.
        images: number of images of each of the step's samples.
    """
    samples = [draw_sample(1000 * step + index, count) for index, count in enumerate(images)]
    starts = range(ranks.world.rank * micro, len(images), ranks.world.size * micro)
    return [pack(samples[start : start + micro], first_id=start) for start in starts]


def run_step(ranks: Any, trainee: Trainee, batches: list[PackedBatch], factor: float = 1.0) -> tuple[float, StepReport]:
    """One optimizer step through the loop's own code; returns the loss over all ranks and the report."""
    supervised = sum_over_ranks([sum(batch.supervised_tokens for batch in batches)], ranks.device)[0]
    loss = run_micro_batches(trainee.engine, batches, supervised)
    mean = sum_over_ranks(loss[None], ranks.device)[0] / ranks.world.size
    return mean, trainee.engine.step(factor)


def in_plain_pytorch(model: Any, stage: Stage, steps: int, images: Sequence[int]) -> list[list[float]]:
    """Loss and gradient norms of steps without DeepSpeed: one batch of four samples, one mean over tokens."""
    plan = plan_stage(model, stage, groups_of(model), CONFIG)
    optimizer = torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "weight_decay": group.weight_decay} for group in plan.groups],
        lr=CONFIG.lr,
        betas=CONFIG.betas,
        eps=CONFIG.eps,
    )
    rows = []
    for step in range(steps):
        (batch,) = step_batches(SimpleNamespace(world=SimpleNamespace(rank=0, size=1)), step, 4, images)
        loss = model(**batch.model_inputs("cpu", torch.float32)).loss
        loss.backward()
        norms = {group.module_group: 0.0 for group in plan.groups}
        for group in plan.groups:
            norms[group.module_group] += sum(float(p.grad.norm() ** 2) for p in group.parameters.values())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([loss.item(), *(square**0.5 for square in norms.values())])
    return rows


def config_for(micro: int, **changes: Any) -> StageConfig:
    """`CONFIG` with another micro-batch."""
    return replace(CONFIG, micro_batch_size=micro, **changes)


def state_of(trainee: Any) -> dict[str, torch.Tensor]:
    """All weights, on every rank."""
    return from_main(trainee.engine.gather_state())


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def expect_error(call: Any) -> str:
    try:
        call()
    except HiveError as error:
        return str(error)
    raise AssertionError("no HiveError")
