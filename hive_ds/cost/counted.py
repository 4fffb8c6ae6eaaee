"""Forward and backward on the meta device, as PyTorch counts their FLOPs and follows their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
        watch_step(model, workload)
    counts = ran.get_flop_counts()["Global"]
    total = float(sum(counts.values()))
    repeated = sum(counts.get(op, 0) for op in ATTENTION_BACKWARD) / 5
    return CountedStep(total, total - repeated)


def watch_step(model: TrainedModel, workload: Workload) -> MemoryWatch:
    """Follow the memory of such a step: by itself, for the FLOP counter's hooks keep alive what checkpointing frees."""
    attend_on_meta(model, workload.size(model))
    inputs = workload.inputs(model, torch.device("meta"))
    watch = MemoryWatch([*model.parameters(), *model.buffers(), inputs["input_ids"], inputs["pixel_values"]])
    hooks = watch.follow_gradients(model.parameters())
    with _every_token_counts(), one_sequence_a_row(), watch:
        model(**inputs).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return watch


@contextmanager
def _every_token_counts() -> Iterator[None]:
    """Indexing by a mask takes everything: on the meta device a mask holds no values."""
    with _config.patch(  # type: ignore[attr-defined]
        meta_nonzero_assume_all_nonzero=True
    ):
        yield
