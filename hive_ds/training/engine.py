"""DeepSpeed, behind one class: the one file that imports it.

The engine takes a model whose stage is planned (`hive_ds.training.groups`), partitions it under ZeRO 0 to 3 and runs
forward, backward and step on it. It checks what DeepSpeed leaves unsaid: a parameter that gets no gradient, a parameter
that is frozen or unfrozen after the start, a gradient that is not finite.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from hive_ds.config import StageConfig
from hive_ds.errors import HiveError
from hive_ds.training.distributed import World, min_over_ranks, sum_over_ranks, uses_gpu
from hive_ds.training.ds_config import zero_section
from hive_ds.training.gather_units import (
    WholeModel,
    external_parameters,
    gather_by_unit,
    gathers_by_layer,
    layer_units,
    restore_linear,
)
from hive_ds.training.grad_norms import gradient_squares, module_group_names
from hive_ds.training.groups import OptimizerGroup, adamw
from hive_ds.training.piece_files import PieceReader
from hive_ds.training.pieces import Piece, own_part, own_pieces, own_tensors, publish_weights, start_state
from hive_ds.training.share_out import share_out

if not uses_gpu():
    os.environ["DS_ACCELERATOR"] = "cpu"  # before the import: DeepSpeed decides then

import deepspeed
import deepspeed.ops
from deepspeed.utils import logger as deepspeed_logger

# On CPUs, joining the process group would compile DeepSpeed's shared-memory all-reduce (g++, 52 s) and leave 66 MB a
# rank in /dev/shm. It serves tensor-parallel inference only. DeepSpeed builds the ops this table calls compatible.
vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    grad_norms: dict[str, float]
    """L2 norm of the gradient of each module group, before clipping."""
    grad_norm: float
    """L2 norm over all groups, before clipping."""
    skipped: bool
    """A gradient was not finite, so no weight changed."""


class Engine:
    """A model partitioned over all ranks, with its optimizer.

    Args:
        model: planned by `plan_stage`; all ranks take the weights of rank 0.
        groups: optimizer groups of ``model``.
        ds_config: of `build_ds_config`.
        stage: betas and eps of AdamW.
        world: this process among all.
        device: of `hive_ds.training.distributed.start`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[OptimizerGroup],
        ds_config: dict[str, Any],
        stage: StageConfig,
        *,
        world: World,
        device: torch.device,
    ) -> None:
        self.world, self.device = world, device
        self.groups = list(groups)
        self.zero_stage: int = zero_section(ds_config)["stage"]
        self.dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32  # of the weights
        self.accumulation: int = ds_config["gradient_accumulation_steps"]
        self.skipped_steps = 0
        if not deepspeed_logger.isEnabledFor(logging.DEBUG):
            deepspeed_logger.setLevel(logging.WARNING)
        self._trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._without_gradient = {name for group in groups for name in group.parameters}
        self._watch = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._without_gradient.discard(name))
            for group in groups
            for name, parameter in group.parameters.items()
        ]
        by_layer = gathers_by_layer(model, ds_config)
        deepspeed.init_distributed()
        divide = partial(deepspeed.zero.Init, config_dict_or_path=ds_config, dtype=self.dtype)
        share_out(model, self.dtype, world, device, divide if self.zero_stage == 3 else None)
        optimizer = adamw(groups, stage, fused=True)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        # ZeRO 0 with bf16 runs a step on zero gradients in its constructor; forget its count.
        optimizer.state.clear()
        self._adamw = optimizer
        self.model: Any = self._engine.module
        self._parameters = dict(self.model.named_parameters())
        self._whole: WholeModel | None = None
        # DeepSpeed would ask all ranks for the norm of each optimizer group: it gets the one that `step` knows.
        if self.zero_stage == 3:
            if by_layer:
                gather_by_unit(self._optimizer, layer_units(self.model), deepspeed.utils.set_z3_leaf_module)
            else:
                self._whole = WholeModel(self._engine)
            self._optimizer._get_norm_groups = lambda: [self._norm]
        elif self.zero_stage > 0:
            self._optimizer.scaled_global_norm = lambda: self._norm
        for module, parameter in external_parameters(self.model):
            deepspeed.zero.register_external_parameter(module, parameter)

    def forward(self, **inputs: Any) -> Any:
        """The model's output for one micro-batch; gradients are recorded unless the model is in evaluation mode."""
        self.gather_parts()
        if self.model.training:
            return self._engine(**inputs)
        with torch.no_grad():
            return self._engine(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``, a scalar.

        Gradients are averaged over ranks and summed over micro-batches, so a loss that is to be a mean over all
        supervised tokens is this rank's sum, times the number of ranks, over the tokens of the whole step.

        Args:
            loss: of `forward`.
            last: this micro-batch completes an optimizer step.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # Times one, for a tensor of its own: DeepSpeed (0.19.8, ZeRO 0) otherwise divides the gradient of its own
        # output by the accumulation steps in spite of scale_wrt_gas=False.
        self._engine.backward(loss * 1, scale_wrt_gas=False)

    def gather_parts(self) -> None:
        """Before parts of the model are called by themselves: gather what they do not; every rank calls it.

        Layers and projectors gather their weights when they are called (ZeRO-3), one that is kept whole all at once.
        """
        if self._whole is not None:
            self._whole.gather()

    def release(self) -> None:
        """Let go of weights that a backward pass outside of `backward` has gathered (ZeRO-3)."""
        if self.zero_stage == 3:
            self._optimizer.parameter_offload.partition_all_parameters()

    def gradient_squares(self) -> Tensor:
        """This rank's share of the squared L2 norm of each module group's gradient: fp64 (module groups,)."""
        main = self.world.is_main
        return gradient_squares(self._optimizer, self.groups, self.zero_stage, is_main=main, device=self.device)

    def step(self, lr_factor: float, squares: Sequence[float] | None = None) -> StepReport:
        """Clip, update the weights and clear the gradients; skip all that where a gradient is not finite.

        Args:
            lr_factor: share of each group's peak learning rate.
            squares: `gradient_squares` added up over all ranks, from a caller that asked for more at the same time;
                asked for here if None.

        Raises:
            HiveError: the first step finds a trained parameter without gradient; or ``requires_grad`` of a parameter
                changed since the engine was made.
        """
        self._check_flips()
        self._check_gradients()
        if squares is None:
            squares = sum_over_ranks(self.gradient_squares(), self.device)
        norms = {name: math.sqrt(x) for name, x in zip(module_group_names(self.groups), squares, strict=True)}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        self._norm = torch.tensor(total, dtype=torch.float64)  # on the CPU, where offloaded gradients are
        skipped = not total < float("inf")
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        if skipped and not self.zero_stage:
            self._engine.zero_grad()
        else:  # ZeRO 1 to 3 find gradients that are not finite themselves, skip and clear their buffers
            self._engine.step()
        if self._whole is not None and not skipped:
            self._whole.renew()
        self.skipped_steps += skipped
        return StepReport(norms, total, skipped)

    def forget_steps(self) -> None:
        """Put the optimizer back to its start, after steps at a rate of 0: they change no weight."""
        start_state(self._optimizer, self._adamw, 0)
        self.skipped_steps = 0

    def use_micro_batch(self, size: int) -> None:
        """Take another number of samples a micro-batch from now on; the global batch stays."""
        total = self._engine.train_batch_size()
        self._engine.set_train_micro_batch_size(size)
        self._engine.set_train_batch_size(total)
        self.accumulation = self._engine.gradient_accumulation_steps()

    def learning_rates(self) -> dict[str, float]:
        """Current learning rate of each optimizer group."""
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}

    def write_events(self, values: dict[str, float], step: int) -> None:
        """Send numbers to TensorBoard and wandb, where the recipe switched them on."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events([(name, value, step) for name, value in values.items()])

    def pieces(self) -> list[Piece]:
        """This rank's part of the trained weights and of AdamW's state, which are zeros before the first step."""
        if not self._adamw.state:
            start_state(self._optimizer, self._adamw, 0)
        return list(own_pieces(self._optimizer, self._adamw, self.groups))

    def restore(self, reader: PieceReader, steps: int) -> None:
        """Take weights and optimizer state from a checkpoint that any number of ranks has saved.

        Learning rates and decay are this run's own.

        Args:
            reader: of the checkpoint's pieces.
            steps: optimizer steps that changed weights.

        Raises:
            HiveError: the checkpoint lacks a part of a parameter.
        """
        self.release()  # of what is gathered later, every part is new
        start_state(self._optimizer, self._adamw, steps)
        pieces = {piece.name: piece for piece in self.pieces()}
        for piece in pieces.values():
            reader.read_into(piece)
        for group in self.groups:
            for name, parameter in group.parameters.items():
                whole = None if self.zero_stage == 3 else reader.read("weight", name, 0, parameter.numel())
                publish_weights(parameter, pieces.get(name), whole)

    @property
    def trained_elements(self) -> int:
        """Elements of all trained parameters, over all ranks."""
        sizes = (getattr(p, "ds_numel", p.numel()) for group in self.groups for p in group.parameters.values())
        return sum(sizes)

    @cached_property
    def frozen_sums(self) -> dict[str, float]:
        """Sum of squares of every frozen weight over all ranks: says whether they are those of another run.

        Every rank asks for it; made once, for frozen weights stay as they are.
        """
        frozen = {name: p for name, p in self._parameters.items() if not self._trained[name]}
        own = [torch.linalg.vector_norm(own_part(p), dtype=torch.float64).item() ** 2 for p in frozen.values()]
        total = sum_over_ranks(own, self.device)
        ranks = 1 if self.zero_stage == 3 else self.world.size
        return {name: value / ranks for name, value in zip(frozen, total, strict=True)}

    def gather_state(self) -> dict[str, Tensor]:
        """All weights and persistent buffers by name, on rank 0's CPU; every rank calls it, others get {}.

        Modules are gathered one by one, so a rank holds one module's full weights at a time.
        """
        # A forward pass without backward, as in validation, leaves weights in flight that were fetched ahead.
        self._engine.empty_partition_cache()
        state: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}
        for prefix, module in self.model.named_modules():
            with self._gathered(list(module._parameters.values())):
                if self.world.is_main:
                    for name, value in own_tensors(module, prefix):
                        # A tied weight stands under two names and stays one tensor.
                        state[name] = copies.setdefault(id(value), value.detach().to("cpu", copy=True))
        return state

    def partition_sizes(self) -> dict[str, int]:
        """Elements that this rank holds of each parameter."""
        return {
            name: parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()
            for name, parameter in self.model.named_parameters()
        }

    def close(self) -> None:
        """Release DeepSpeed's hooks, buffers and, under hpZ, its process group, which a later engine would inherit."""
        self._engine.destroy()
        restore_linear()
        group = deepspeed.utils.groups._get_zero_param_intra_parallel_group()
        if group is not None:
            deepspeed.comm.destroy_process_group(group)

    def _gathered(self, parameters: Sequence[nn.Parameter | None]) -> Any:
        partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
        return deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned))

    def _check_flips(self) -> None:
        flipped = [name for name, p in self._parameters.items() if p.requires_grad != self._trained[name]]
        if flipped:
            raise HiveError(
                f"requires_grad of {', '.join(flipped)} changed after training began, which DeepSpeed ignores; "
                "what trains is decided once per stage (hive_ds.stages)"
            )

    def _check_gradients(self) -> None:
        if not self._watch:
            return
        for handle in self._watch:
            handle.remove()
        self._watch = []
        names = [name for group in self.groups for name in group.parameters]
        reached = min_over_ranks([float(name not in self._without_gradient) for name in names], self.device)
        without = [name for name, flag in zip(names, reached, strict=True) if not flag]
        if without:
            raise HiveError(
                f"step 1 gave no gradient to {len(without)} parameters that should train: {', '.join(without)}"
            )
