"""What ZeRO-3 gathers at a time: an encoder block, an LLM layer, a projector, or all of a model that is not large.

DeepSpeed would gather the weights of every `nn.Linear` and norm by themselves, with four Python hooks around each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hive_ds.model.language import decoder
from hive_ds.model.vision import vision_blocks
from hive_ds.training.ds_config import zero_section


def layer_units(model: Any) -> list[nn.Module]:
    """Encoder blocks, LLM layers and projectors; what is in none of them is gathered module by module.

    Args:
        model: a `HiveForCausalLM` or `CascadedForCausalLM`.
    """
    projectors = model.projectors.values() if hasattr(model, "projectors") else [model.projector]
    return [*vision_blocks(model.vision_encoder), *decoder(model.language_model).layers, *projectors]


def external_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Weights that a module reads without calling the module that owns them, each with the one that reads it."""
    for module in model.modules():
        declared: Callable[[], list[nn.Parameter]] = getattr(module, "external_parameters", list)
        for parameter in declared():
            yield module, parameter


def gather_by_unit(optimizer: Any, units: Sequence[nn.Module], mark: Callable[[nn.Module, bool], None]) -> None:
    """Put DeepSpeed's ZeRO-3 hooks on ``units`` (its "leaves") in place of the modules inside of them.

    They must be marked after DeepSpeed's start (0.19.8). It reduces the gradients of a leaf that it knows at its start
    as soon as those of the leaf's inputs exist; where these need none, that is before the leaf's first gradient.

    Small weights (``stage3_param_persistence_threshold``), which DeepSpeed renews after every step by a message each,
    frozen or not, come with their unit in the next forward pass instead.

    Args:
        optimizer: DeepSpeed's, of ZeRO-3.
        units: none inside of another.
        mark: ``deepspeed.utils.set_z3_leaf_module``.
    """
    _remove_hooks(optimizer)
    for unit in units:
        mark(unit, True)
    optimizer.parameter_offload.setup_zero_stage3_hooks()
    _use_plain_linear_in_graphs()


def _remove_hooks(optimizer: Any) -> None:
    """Take off what DeepSpeed gathers and renews weights by."""
    offload = optimizer.parameter_offload
    offload._remove_module_hooks()
    offload.forward_hooks.clear()
    offload.backward_hooks.clear()
    optimizer.persistent_parameters = []


class WholeModel:
    """A model that ZeRO-3 would hardly let go of within a step: gathered once, renewed after every step.

    Whatever fetches missing weights has nothing left to do and is removed: ZeRO-3's hooks, its dictionaries of
    parameters, and its linear function, which releases weights between forward and backward.

    Args:
        engine: DeepSpeed's, of ZeRO-3.
    """

    def __init__(self, engine: Any) -> None:
        optimizer, model = engine.optimizer, engine.module
        self._weights: list[Any] = list(model.parameters())
        self._trained = [parameter for parameter in self._weights if parameter.requires_grad]
        for parameter in self._weights:
            parameter.ds_persist = True
        _remove_hooks(optimizer)
        engine.module_forward_pre_hook.remove()  # these switch the dictionaries on and off
        engine.module_forward_post_hook.remove()
        for module in model.modules():
            module._parameters = dict(module._parameters)
        optimizer._partition_all_parameters = lambda: None
        restore_linear()

    def gather(self) -> None:
        """Bring the weights that are not in place: all of them at first and after they were let go."""
        missing = [weight for weight in self._weights if weight.numel() != weight.ds_numel]
        if missing:
            missing[0].all_gather(missing)

    def renew(self) -> None:
        """Bring the trained weights up to date, in place and in one message, behind an optimizer step."""
        parts = [parameter.ds_tensor for parameter in self._trained]
        ranks = dist.get_world_size()
        if ranks == 1 and all(w.data_ptr() == part.data_ptr() for w, part in zip(self._trained, parts, strict=True)):
            return  # a rank by itself trains on its own part
        own = torch.cat([part.to(self._trained[0].device) for part in parts])
        found = own[None]
        if ranks > 1:
            found = own.new_empty(ranks, len(own))
            dist.all_gather_into_tensor(found.view(-1), own)
        columns = found.split([len(part) for part in parts], dim=1)
        places = [parameter.data.view(-1) for parameter in self._trained]
        # Each column is a parameter, rank after rank, with padding at its end.
        values = [column.reshape(-1)[: len(place)] for column, place in zip(columns, places, strict=True)]
        torch._foreach_copy_(places, values)


def whole_limit(policy: Mapping[str, Any]) -> int:
    """Elements of the largest model that ZeRO-3 keeps whole (`WholeModel`).

    As many as DeepSpeed would let be gathered at a time and wait for their next use.
    """
    zero = zero_section(policy)
    return min(int(zero[key]) for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance"))


def gathers_by_layer(model: nn.Module, policy: Mapping[str, Any]) -> bool:
    """Whether weights come and go with the layers of a model that is not partitioned yet."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    return zero_section(policy)["stage"] == 3 and elements > whole_limit(policy)


def _use_plain_linear_in_graphs() -> None:
    """Give what torch.compile traces PyTorch's own linear function, until `restore_linear`.

    The backward pass of ZeRO-3's reads a weight's id, which becomes a constant of the graph: each layer would be
    compiled by itself, and after the eighth torch gives up. A compiled piece saves weights as they are, so that they
    can be released all the same (`tests/training/compile_checks.py`).
    """
    of_zero3 = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (torch._C._nn.linear if torch.compiler.is_compiling() else of_zero3)(x, weight, bias)

    nn.functional.linear = linear  # type: ignore[assignment]


def restore_linear() -> None:
    """Put PyTorch's linear function back, which ZeRO-3 replaces for all models of the process."""
    nn.functional.linear = torch._C._nn.linear
