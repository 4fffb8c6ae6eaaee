"""One optimizer step of a model on one device, in plain torch and under the DeepSpeed engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from hive_ds.benchmarks.agreement import Loss, Outcome, weights_of
from hive_ds.config import StageConfig, TrainingConfig
from hive_ds.data.batch import PackedBatch
from hive_ds.training.groups import StagePlan, adamw

CONFIG = StageConfig(lr=1e-6, global_batch_size=1, micro_batch_size=1, weight_decay=1e-5, clip=1.0)
"""A small rate: the weights stay where they are, and no way of training sees others."""


class Stepper(Protocol):
    """Something that trains on one batch."""

    def step(self, batch: PackedBatch) -> float | Tensor:
        """One optimizer step; the mean loss."""

    def forget(self) -> None:
        """Drop what a step has left behind that ran out of memory."""


class PlainStepper:
    """Forward, backward, clipping and AdamW on fp32 copies of what trains, as ZeRO keeps them.

    Args:
        plan: of the stage.
        loss: summed cross-entropy of a batch.
        device: of the model.
    """

    def __init__(self, plan: StagePlan, loss: Loss, device: torch.device) -> None:
        self.loss, self.device = loss, device
        self.optimizer = adamw(plan.groups, CONFIG, fused=True)
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        for master in self.masters:
            master.grad = torch.empty_like(master)
        copies = iter(self.masters)
        for group in self.optimizer.param_groups:
            group["params"] = [next(copies) for _ in group["params"]]
            group["lr"] = CONFIG.lr

    def step(self, batch: PackedBatch) -> Tensor:
        """One optimizer step; the mean loss, still on the device."""
        loss = self.loss(batch, self.device) / batch.supervised_tokens
        loss.backward()
        with record_function("part:optimizer"), torch.no_grad():
            torch._foreach_copy_([master.grad for master in self.masters], [weight.grad for weight in self.weights])
            for weight in self.weights:
                weight.grad = None
            torch.nn.utils.clip_grad_norm_(self.masters, CONFIG.clip, foreach=True)
            self.optimizer.step()
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()

    def forget(self) -> None:
        """Drop the gradients of a step that ran out of memory."""
        for weight in self.weights:
            weight.grad = None


def packed_loss(model: Any) -> Loss:
    """The model's own loss on packed batches."""

    def loss(batch: PackedBatch, device: torch.device) -> Tensor:
        dtype = next(model.parameters()).dtype
        with record_function("part:data"):
            inputs = batch.model_inputs(device, dtype)
        return model(**inputs, num_items_in_batch=1).loss

    return loss


def engine_refusal() -> str | None:
    """Why the DeepSpeed engine cannot be timed; None if it and all that its step needs load."""
    try:
        import hive_ds.training.loop  # noqa: F401
    except Exception as error:  # of whichever package is missing or does not fit the others
        return f"the engine does not load here: {error}"
    return None


class EngineStepper:
    """The loop's own step under the engine, on one rank.

    Args:
        model: is partitioned for good.
        plan: of its stage.
        policy: name of a ZeRO policy.
        precision: ``bf16`` or ``fp32``.
    """

    def __init__(self, model: Any, plan: StagePlan, policy: str, precision: str) -> None:
        from hive_ds.training.distributed import World, start
        from hive_ds.training.ds_config import build_ds_config, read_policy
        from hive_ds.training.engine import Engine

        world = World()
        device = start(world)
        training = TrainingConfig(precision=precision)
        folder = Path(tempfile.gettempdir())
        config = build_ds_config(read_policy(policy), CONFIG, training, num_ranks=1, log_folder=folder, job="step")
        self._weights = weights_of(plan)
        self.engine = Engine(model, plan.groups, config, CONFIG, world=world, device=device)

    def step(self, batch: PackedBatch) -> float:
        """One optimizer step; the mean loss. As the loop does, it asks for loss and norms at once."""
        from hive_ds.training.distributed import sum_over_ranks

        own = self._accumulate(batch)
        with record_function("part:optimizer"):
            told = torch.cat([own.double()[None], self.engine.gradient_squares()])
            loss, *squares = sum_over_ranks(told, self.engine.device)
            self.engine.step(1.0, squares)
        return loss

    def outcome(self, batch: PackedBatch) -> Outcome:
        """One optimizer step; what the batch gave before it."""
        loss = float(self._accumulate(batch))
        gradients = [self.engine._optimizer.get_fp32_grad_for_param(weight) for weight in self._weights]
        self.engine.step(1.0)
        return Outcome(loss, gradients)

    def _accumulate(self, batch: PackedBatch) -> Tensor:
        from hive_ds.training.loop import run_micro_batches

        return run_micro_batches(self.engine, [batch], batch.supervised_tokens)

    def forget(self) -> None:
        """Drop the gradients of a step that ran out of memory, which DeepSpeed still has in its buckets."""
        optimizer = self.engine._optimizer
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()
        for parameter in self.engine.model.parameters():
            parameter.grad = None
        optimizer.exit_backward()
        optimizer.clear_backward_seen_flag()

    def close(self) -> None:
        """Leave the process group."""
        from hive_ds.training.distributed import stop

        self.engine.close()
        stop()
