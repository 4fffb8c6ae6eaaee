"""A stage's model as planning sees it: parameters, FLOPs, activations and the order of modules, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hive_ds.config import Recipe, StageConfig
from hive_ds.cost.counted import run_step, watch_step
from hive_ds.cost.memory import ModelStates, model_state_bytes, weight_bytes, zero_buffer_bytes
from hive_ds.cost.model import meta_model
from hive_ds.cost.workload import Workload
from hive_ds.planning.communication import ParameterLayout, StepMessages, ZeroPolicy, step_messages
from hive_ds.planning.trace import Trace, recorded
from hive_ds.training.flops import FlopCounter
from hive_ds.training.groups import StagePlan


@dataclass(frozen=True)
class StageModel:
    """What does not depend on the cluster."""

    config: StageConfig
    plan: StagePlan
    precision: str
    layout: ParameterLayout
    trace: Trace
    flops_per_sample: float
    """On hardware: forward, backward and what backward repeats."""
    activations: tuple[int, int]
    """Bytes beside the model states at the peak of a micro-batch of one sample, and of each further one."""

    @classmethod
    def of(cls, recipe: Recipe, stage: int, text_length: int) -> StageModel:
        """Count a stage's model; every sample has one image and ``text_length`` tokens.

        Raises:
            HiveError: no such stage, or a model whose size is not known.
        """
        one, two = Workload(1, text_length), Workload(2, text_length)
        model, plan = meta_model(recipe, stage)
        layout, size, closed = ParameterLayout.of(model, plan), one.size(model), FlopCounter(model, plan)
        flops = closed.count(size) + closed.repeated(size, checkpointing=recipe.model.gradient_checkpointing)
        watches = [watch_step(model, workload) for workload in (one, two)]
        peaks = [watch.peak for watch in watches]
        with recorded(model) as trace:  # by itself: what it hangs on keeps activations alive
            run_step(model, one)
        return cls(
            config=recipe.stages[plan.stage.name],
            plan=plan,
            precision=recipe.training.precision,
            layout=layout,
            trace=trace,
            flops_per_sample=flops,
            activations=(peaks[0], peaks[1] - peaks[0]),
        )

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(self.layout.sizes.values())

    @property
    def trained(self) -> int:
        """Of those, how many train."""
        return sum(self.layout.sizes[name] for name in self.layout.trained)

    def states(self, policy: Mapping[str, Any], ranks: int, ranks_per_copy: int) -> ModelStates:
        """Weights, gradients and optimizer of one rank."""
        return model_state_bytes(self.plan, policy, ranks=ranks, precision=self.precision, hpz=ranks_per_copy)

    def memory(self, states: ModelStates, policy: Mapping[str, Any], micro_batch: int) -> dict[str, float]:
        """Bytes on the GPU at the peak, by category."""
        first, further = self.activations
        return {
            **states.by_category,
            "activations": first + (micro_batch - 1) * further,
            "zero_buffers": zero_buffer_bytes(self.plan, policy, precision=self.precision),
        }

    def messages(self, policy: ZeroPolicy, ranks: int, micro_batches: int) -> StepMessages:
        """Collectives of one rank in one optimizer step."""
        return step_messages(
            self.layout,
            self.trace,
            policy,
            num_ranks=ranks,
            micro_batches=micro_batches,
            weight_bytes=weight_bytes(self.precision),
        )
