"""What ZeRO-3 gathers at a time: an encoder block, an LLM layer, a projector, or a small model whole.

DeepSpeed would gather the weights of every `nn.Linear` and norm by themselves, with four Python hooks around each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hive_ds.model.language import decoder
from hive_ds.model.vision import vision_blocks


def layer_units(model: Any) -> list[nn.Module]:
    """Encoder blocks, LLM layers and projectors; what is in none of them is gathered module by module.

    Args:
        model: a `HiveForCausalLM` or `CascadedForCausalLM`.
    """
    projectors = model.projectors.values() if hasattr(model, "projectors") else [model.projector]
    return [*vision_blocks(model.vision_encoder), *decoder(model.language_model).layers, *projectors]


def gather_by_unit(
    optimizer: Any, model: nn.Module, prefetch_bucket: int, mark: Callable[[nn.Module, bool], None]
) -> bool:
    """Put DeepSpeed's ZeRO-3 hooks on units (its "leaves") in place of the modules inside of them.

    Units are layers, or ``model`` itself where one prefetch would bring all of it anyway. A model that is one unit
    stays whole, once gathered, until the optimizer steps, and its frozen weights longer. So DeepSpeed's own linear
    function, which lets weights go between forward and backward, has nothing left to do and PyTorch's is put back.

    They must be marked after DeepSpeed's start (0.19.8): of a leaf that is known then, it reduces the gradients when
    those of the leaf's inputs are there, which is before the first gradient of a leaf whose inputs need none.

    Small weights (``stage3_param_persistence_threshold``), which DeepSpeed renews after every step by a message each,
    frozen or not, come with their unit in the next forward pass instead.

    Args:
        optimizer: DeepSpeed's, of ZeRO-3.
        model: partitioned by it.
        prefetch_bucket: elements, ``stage3_prefetch_bucket_size``.
        mark: ``deepspeed.utils.set_z3_leaf_module``.

    Returns:
        Whether the model is one unit.
    """
    parameters = list(model.parameters())
    is_one_unit = sum(parameter.ds_numel for parameter in parameters) <= prefetch_bucket
    offload = optimizer.parameter_offload
    offload._remove_module_hooks()
    offload.forward_hooks.clear()
    offload.backward_hooks.clear()
    for unit in [model] if is_one_unit else layer_units(model):
        mark(unit, True)
    offload.setup_zero_stage3_hooks()
    optimizer.persistent_parameters = []
    if is_one_unit:
        for parameter in parameters:
            parameter.ds_persist = True
        trained = _Trained(model)
        optimizer._partition_all_parameters = lambda: offload.get_param_coordinator().release_and_reset_all(trained)
        restore_linear()
    return is_one_unit


class _Trained:
    """The trained parameters of a module, in the form in which DeepSpeed asks a module for all of its own."""

    def __init__(self, module: nn.Module) -> None:
        self._named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]

    def named_parameters(self, recurse: bool) -> list[tuple[str, nn.Parameter]]:
        return self._named

    def ds_external_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return []


def restore_linear() -> None:
    """Put PyTorch's linear function back, which ZeRO-3 replaces for all models of the process."""
    nn.functional.linear = torch._C._nn.linear
