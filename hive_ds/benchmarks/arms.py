"""The ways of training that are timed beside each other, and the check that each computes what it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from hive_ds.benchmarks.agreement import Loss, Outcome, compared, outcome
from hive_ds.benchmarks.padded_ways import PaddedCascade, PaperWay
from hive_ds.benchmarks.sizes import Size, build_cascaded, build_hive
from hive_ds.benchmarks.trainer import (
    CONFIG,
    EngineStepper,
    PlainStepper,
    Stepper,
    engine_refusal,
    packed_loss,
)
from hive_ds.data.batch import PackedBatch
from hive_ds.model.compiling import compile_blocks
from hive_ds.model.flash import TORCH_FLASH
from hive_ds.model.language import decoder
from hive_ds.stages import Stage, stage_by_number
from hive_ds.training.ds_config import read_policy
from hive_ds.training.flops import BatchSize, FlopCounter
from hive_ds.training.gather_units import gathers_by_layer
from hive_ds.training.groups import StagePlan, groups_of, plan_stage

POLICY = "zero3"
Way = tuple[Callable[[PackedBatch], Outcome], Callable[[], Stepper]]
"""What gives loss and gradients of a batch, to be checked, and what makes the stepper, to be timed."""


@dataclass
class Arm:
    """One way of training, checked and compiled."""

    name: str
    label: str
    model: Any
    make_stepper: Callable[[], Stepper]
    flops: FlopCounter
    check: str
    """"passed", or what is wrong: then it is not timed."""
    stays: bool = False
    """Whether its memory is an engine's, which cannot leave the GPU while others are timed."""
    full: set[str] = field(default_factory=set)
    """Kinds of texts of which a batch did not fit into memory."""

    @cached_property
    def stepper(self) -> Stepper:
        """Made when it is needed: it holds an optimizer's states."""
        return self.make_stepper()

    def move(self, device: torch.device | str) -> None:
        """Take the model there, if it can move: away from the GPU while others are timed, and back."""
        if not self.stays:
            self.model.to(device)

    def forget(self) -> None:
        """Drop what a step has left behind that ran out of memory."""
        if "stepper" in self.__dict__:
            self.stepper.forget()

    def close(self) -> None:
        """Let go of the stepper's memory."""
        stepper = self.__dict__.pop("stepper", None)
        if hasattr(stepper, "close"):
            stepper.close()


@dataclass(frozen=True)
class Setting:
    """What all arms of a run share."""

    size: Size
    stage: int
    device: torch.device
    compiled: bool
    """Whether torch.compile is used: not on CPUs, where it needs a compiler and minutes."""

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a GPU, fp32 elsewhere."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def described(self, kind: str) -> Stage:
        """The stage of a model of ``kind``."""
        return stage_by_number(self.stage, kind)


LABELS = {
    "ours": "ours, packed",
    "ours compiled": "ours, packed, torch.compile",
    "ours flash": "ours, packed, torch.compile, torch's flash attention where no image is seen",
    "paper": "the paper's way: padded, dense mask, scattered keys, SDPA, torch.compile",
    "sa": "SA: patches in the sequence, padded, causal SDPA, torch.compile",
    "sa packed": "SA in our code: packed, our kernel, torch.compile",
    "ours zero3": "ours, packed, torch.compile, DeepSpeed ZeRO-3 engine, 1 rank",
}


def arm_names(setting: Setting) -> list[str]:
    """In the order in which they are timed, the most telling first."""
    names = ("ours compiled", "paper", "sa", "ours zero3", "ours flash", "ours", "sa packed")
    return [name for name in names if setting.compiled or name not in ("ours compiled", "ours flash")]


def refusal(name: str) -> str | None:
    """Why an arm cannot run here."""
    return engine_refusal() if name == "ours zero3" else None


def build_arm(name: str, setting: Setting, probes: Sequence[PackedBatch]) -> Arm:
    """Build a way of training with its own weights, the same in all that train one model.

    It is checked on each of ``probes``, small batches of different numbers of images; they compile what is compiled.
    """
    if setting.compiled:  # scales and epsilons as numbers, for all ways: else a tensor each, made at every call
        torch._dynamo.config.specialize_float = True
    cascaded = name.startswith("sa")
    stage = setting.described("cascaded" if cascaded else "hive")
    if cascaded:
        model: Any = build_cascaded(setting.size, setting.device, setting.dtype)
    else:
        model = build_hive(setting.size, stage, setting.device, setting.dtype)
    plan = plan_stage(model, stage, groups_of(model), CONFIG)
    counter = FlopCounter(model, plan)
    own = packed_loss(model)
    references = [outcome(own, plan, probe, setting.device).kept_aside() for probe in probes]
    if name == "ours zero3":
        run, make_stepper = _under_engine(model, plan, setting)
    else:
        run, make_stepper = _in_plain_torch(_loss_of(name, model, setting), plan, setting)
    verdicts = [compared(run(probe), wanted, setting.dtype) for probe, wanted in zip(probes, references, strict=True)]
    verdict = next((verdict for verdict in verdicts if verdict != "passed"), "passed")
    return Arm(name, LABELS[name], model, make_stepper, counter, verdict, stays=name == "ours zero3")


def _under_engine(model: Any, plan: StagePlan, setting: Setting) -> Way:
    """Partition the model for good. Each check is a step, too small a one to be seen in the next loss."""
    if setting.compiled:
        apart = gathers_by_layer(model, read_policy(POLICY))
        compile_blocks(model, setting.device, setting.dtype, apart=apart)
    precision = "bf16" if setting.dtype == torch.bfloat16 else "fp32"
    stepper = EngineStepper(model, plan, POLICY, precision)
    return stepper.outcome, lambda: stepper


def _in_plain_torch(loss: Loss, plan: StagePlan, setting: Setting) -> Way:
    return partial(outcome, loss, plan, device=setting.device), partial(PlainStepper, plan, loss, setting.device)


def _loss_of(name: str, model: Any, setting: Setting) -> Loss:
    if name == "paper":
        way: Any = PaperWay(model)
    elif name == "sa":
        way = PaddedCascade(model)
    else:
        if name == "ours flash":
            for layer in decoder(model.language_model).layers:
                layer.self_attn.backend = "auto" if layer.self_attn.routed else TORCH_FLASH
        if setting.compiled and name in ("ours compiled", "ours flash", "sa packed"):
            compile_blocks(model, setting.device, setting.dtype)
        return packed_loss(model)
    if setting.compiled:
        # The peers' padded shapes coincide now and then, and each coincidence is compiled: none must give up for that.
        torch._dynamo.config.recompile_limit = 64
        way.compile()
    return way.loss


def work_of(batch: PackedBatch, patches: int) -> BatchSize:
    """What a batch asks of a model."""
    return BatchSize.of(
        batch.text_lengths, batch.image_offsets, batch.supervised_tokens, [patches] * len(batch.images["pixel_values"])
    )
