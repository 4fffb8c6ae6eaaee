"""What one stage of a recipe costs: FLOPs in closed form and counted, memory of one rank by category."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hive_ds.config import Recipe
from hive_ds.cost.counted import count_step, watch_step
from hive_ds.cost.memory import model_state_bytes, weight_bytes, zero_buffer_bytes
from hive_ds.cost.model import meta_model
from hive_ds.cost.workload import Workload
from hive_ds.errors import HiveError
from hive_ds.planning.communication import ParameterLayout, ZeroPolicy, step_messages
from hive_ds.planning.messages import bytes_sent
from hive_ds.planning.trace import recorded
from hive_ds.stages import STAGES_BY_KIND, Stage
from hive_ds.training.ds_config import read_policy
from hive_ds.training.flops import FlopCounter
from hive_ds.training.global_batch import fit_micro_batch

RANKS_PER_NODE = 8
"""What ``zero_hpz_partition_size: auto`` stands for where no run has counted them."""


@dataclass(frozen=True)
class StageCost:
    """Cost of a micro-batch on one rank; FLOPs of its forward and backward, bytes at the peak."""

    recipe: str
    stage: int
    name: str
    batch: int
    text_length: int
    global_batch: int
    ranks: int
    policy: str
    precision: str
    gradient_checkpointing: bool
    model_flops: dict[str, float]
    """In closed form, by part."""
    hardware_flops: float
    """In closed form, with all that backward repeats."""
    counted_model_flops: float
    """By PyTorch, on the meta device."""
    counted_hardware_flops: float
    memory: dict[str, int]
    """Bytes on the device, by category."""
    host_memory: int
    """Bytes in CPU memory, where the policy offloads."""
    sent: dict[str, float]
    """Bytes that a rank sends in an optimizer step, for weights and for gradients."""

    @property
    def total_flops(self) -> float:
        """Model FLOPs of the micro-batch."""
        return sum(self.model_flops.values())

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return sum(self.memory.values())

    @property
    def step_flops(self) -> float:
        """Model FLOPs of an optimizer step over all ranks."""
        return self.total_flops * self.global_batch / self.batch


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe describes."""
    return [stage for stage in STAGES_BY_KIND[recipe.model.kind] if stage.name in recipe.stages]


def cost_of_stage(recipe: Recipe, stage: int, *, text_length: int, batch: int | None, ranks: int) -> StageCost:
    """Cost a stage.

    Args:
        recipe: says models, precision, checkpointing and ZeRO policy.
        stage: its number.
        text_length: tokens of each sample.
        batch: samples of a micro-batch; None: the recipe's, as it fits the ranks.
        ranks: of the run.

    Raises:
        HiveError: no such stage, unknown models, or ranks that do not divide the global batch.
    """
    model, plan = meta_model(recipe, stage)
    config = recipe.stages[plan.stage.name]
    if batch is None and config.micro_batch_size == "auto":
        raise HiveError(
            f"stages.{plan.stage.name}.micro_batch_size is auto, which only a run can tell; expected --batch N"
        )
    workload = Workload(batch or fit_micro_batch(config, ranks).micro_batch, text_length)
    size, closed, checkpointing = workload.size(model), FlopCounter(model, plan), recipe.model.gradient_checkpointing
    parts = closed.parts(size)
    watch = watch_step(model, workload)
    with recorded(model) as trace:
        counted = count_step(model, workload)
    plainly = counted.model_flops
    if checkpointing:
        unchecked = replace(recipe, model=replace(recipe.model, gradient_checkpointing=False))
        plainly = count_step(meta_model(unchecked, stage)[0], workload).model_flops
    policy, precision = read_policy(recipe.training.ds_config), recipe.training.precision
    zero = ZeroPolicy.of(policy, ranks, RANKS_PER_NODE)
    states = model_state_bytes(plan, policy, ranks=ranks, precision=precision, hpz=zero.ranks_per_copy)
    messages = step_messages(
        ParameterLayout.of(model, plan),
        trace,
        zero,
        num_ranks=ranks,
        micro_batches=math.ceil(config.global_batch_size / (workload.batch * ranks)),
        weight_bytes=weight_bytes(precision),
    )
    return StageCost(
        recipe=recipe.name,
        stage=stage,
        name=plan.stage.name,
        batch=workload.batch,
        text_length=text_length,
        global_batch=config.global_batch_size,
        ranks=ranks,
        policy=recipe.training.ds_config,
        precision=precision,
        gradient_checkpointing=checkpointing,
        model_flops=parts,
        hardware_flops=sum(parts.values()) + closed.repeated(size, checkpointing=checkpointing),
        counted_model_flops=plainly,
        counted_hardware_flops=counted.hardware_flops,
        memory={
            **states.by_category,
            "activations": watch.activations,
            "temporaries": watch.temporaries,
            "zero_buffers": zero_buffer_bytes(plan, policy, precision=precision),
        },
        host_memory=states.host,
        sent={
            "weights": bytes_sent([*messages.gathers, *messages.renewals]),
            "gradients": bytes_sent(messages.gradients),
        },
    )
