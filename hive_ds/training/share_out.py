"""How the ranks come by the weights that rank 0 has read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hive_ds.training.distributed import World


def share_out(
    model: nn.Module,
    dtype: torch.dtype,
    world: World,
    device: torch.device,
    divide: Callable[[nn.Module], object] | None,
) -> None:
    """Bring a model to the device and type of training: rank 0 its weights, the others room for those of rank 0.

    DeepSpeed sends them. Divided one by one, no rank but 0 ever holds the whole model, and no GPU.

    Args:
        model: not partitioned yet.
        dtype: of all weights; buffers keep theirs.
        world: this process among all.
        device: of this rank.
        divide: under ZeRO-3, what sends a module's weights and leaves each rank its part (``deepspeed.zero.Init``).
    """
    divided: Any = None
    for parameter in model.parameters():
        own = parameter.data
        parameter.data = own.to(device, dtype) if world.is_main else torch.empty_like(own, dtype=dtype, device=device)
        if divided is not None:
            divided.convert_to_zero_parameters(param_list=[parameter])
        elif divide is not None:
            divide(nn.ParameterList([parameter]))
            divided = parameter
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
