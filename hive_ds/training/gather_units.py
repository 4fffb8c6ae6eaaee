"""What ZeRO-3 gathers at a time: an encoder block, an LLM layer, a projector.

DeepSpeed would gather the weights of every `nn.Linear` and norm by themselves, with four Python hooks around each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def gather_by_unit(optimizer: Any, units: Sequence[nn.Module], mark: Callable[[nn.Module, bool], None]) -> None:
    """Put DeepSpeed's ZeRO-3 hooks on ``units`` (its "leaves") in place of the modules inside of them.

    They must be marked after DeepSpeed's start (0.19.8): of a leaf that is known then, it reduces the gradients when
    those of the leaf's inputs are there, which is before the first gradient of a leaf whose inputs need none.

    Small weights (``stage3_param_persistence_threshold``), which DeepSpeed renews after every step by a message each,
    frozen or not, come with their unit in the next forward pass instead.

    Args:
        optimizer: DeepSpeed's, of ZeRO-3.
        units: none inside of another.
        mark: ``deepspeed.utils.set_z3_leaf_module``.
    """
    offload = optimizer.parameter_offload
    offload._remove_module_hooks()
    offload.forward_hooks.clear()
    offload.backward_hooks.clear()
    for unit in units:
        mark(unit, True)
    offload.setup_zero_stage3_hooks()
    optimizer.persistent_parameters = []
