"""Forward and backward on the meta device, as PyTorch counts their FLOPs and follows their memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental import _config
from torch.utils.flop_counter import FlopCounterMode

from hive_ds.cost.memory_watch import MemoryWatch
from hive_ds.cost.meta_attention import ATTENTION_BACKWARD, attend_on_meta
from hive_ds.cost.workload import Workload
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.language import one_sequence_a_row


@dataclass(frozen=True)
class CountedStep:
    """One micro-batch, forward and backward, as it would run."""

    hardware_flops: float
    """Everything that runs, repeated work included."""
    model_flops: float
    """Without what fused attention repeats; without checkpointing these are the FLOPs that the model needs."""


def count_step(model: TrainedModel, workload: Workload) -> CountedStep:
    """Count a step of ``model``, on the meta device with its stage planned; its gradients are cleared afterwards."""
    with FlopCounterMode(display=False) as ran:
        run_step(model, workload)
    counts = ran.get_flop_counts()["Global"]
    total = float(sum(counts.values()))
    repeated = sum(counts.get(op, 0) for op in ATTENTION_BACKWARD) / 5
    return CountedStep(total, total - repeated)


def run_step(model: TrainedModel, workload: Workload) -> None:
    """Forward and backward of such a step, for those that count in their own way."""
    _run(model, _inputs(model, workload))


def watch_step(model: TrainedModel, workload: Workload) -> MemoryWatch:
    """Follow the memory of such a step: by itself, for the FLOP counter's hooks keep alive what checkpointing frees."""
    inputs = _inputs(model, workload)
    watch = MemoryWatch([*model.parameters(), *model.buffers(), inputs["input_ids"], inputs["pixel_values"]])
    hooks = watch.follow_gradients(model.parameters())
    with watch:
        _run(model, inputs)
    for hook in hooks:
        hook.remove()
    return watch


def _inputs(model: TrainedModel, workload: Workload) -> dict[str, Any]:
    attend_on_meta(model, workload.size(model))
    return workload.inputs(model, torch.device("meta"))


def _run(model: TrainedModel, inputs: dict[str, Any]) -> None:
    # Indexing by a mask takes everything: on the meta device a mask holds no values.
    every_token_counts = _config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    with every_token_counts, one_sequence_a_row():
        model(**inputs).loss.backward()
    model.zero_grad()
