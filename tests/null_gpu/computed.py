"""Ranks on GPUs that compute: ``python computed.py MODULE:FUNCTION ARGUMENTS`` under the null GPU's variables.

PyTorch and DeepSpeed take each rank for one with a GPU: allocator, streams, pinned copies and NCCL's process group are
those of CUDA. The null GPU's memory is the host's, so what an operator computes is computed by the CPU's operator in
that memory. Streams have no meaning here: everything is done when its call returns. Nothing runs that is compiled for a
GPU: Triton's kernels, Inductor's graphs, cuDNN and flash attention; attention and loss take their plain ways.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

AS_THEY_ARE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"),
    *("_unsafe_view", "detach", "lift_fresh", "is_pinned", "_pin_memory", "record_stream"),
}
"""Operators that compute nothing, beside views."""
NO_TRITON = "this GPU runs no kernel of Triton"


class ComputedOnTheCPU(TorchDispatchMode):
    """Has every operator with a tensor on a GPU computed on the CPU, in the GPU's memory."""

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.Generator, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator with what lies on the GPU as tensors of the CPU over the same memory."""
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d" or func.is_view or name in AS_THEY_ARE:
            return func(*args, **kwargs)
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def to_cpu(x: Any) -> Any:
            if isinstance(x, torch.Generator) and x.device.type == "cuda":
                return self._generators.setdefault(x, torch.Generator().manual_seed(x.initial_seed()))
            if not (isinstance(x, Tensor) and x.is_cuda):
                return x
            same = _on_cpu(x)
            seen[id(same)] = (same, x)
            return same

        cpu_args, cpu_kwargs = tree_map(to_cpu, (args, kwargs))
        device = next((x.device for _, x in seen.values()), None)
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            cpu_kwargs = {**cpu_kwargs, "device": torch.device("cpu")}
            cpu_kwargs.pop("pin_memory", None)
        if not seen and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        try:
            result = func(*cpu_args, **cpu_kwargs)
        except NotImplementedError:  # GPUs have operators that CPUs lack
            result = decomposition_table[func](*cpu_args, **cpu_kwargs)

        def to_gpu(x: Any) -> Any:
            if id(x) in seen:  # written in place
                return seen[id(x)][1]
            if not isinstance(x, Tensor) or device.type != "cuda" or any(x is arg for arg in args):
                return x
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            _on_cpu(made).copy_(x)
            return made

        return tree_map(to_gpu, result)


def _on_cpu(x: Tensor) -> Tensor:
    """A tensor of the CPU over the memory of one on the null GPU."""
    storage, base = x.untyped_storage(), torch.empty(0, dtype=torch.uint8)
    if storage.nbytes():
        memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        base = torch.frombuffer(memory, dtype=torch.uint8)
    return torch.empty(0, dtype=x.dtype).set_(base.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def main(arguments: Sequence[str]) -> int:
    """Import the function and call it with the rest of the arguments, as one list, in a process that has a GPU."""
    from hive_ds.kernels import backends
    from hive_ds.model import language_loss
    from hive_ds.training import flops

    assert torch.cuda.get_device_name() == "null GPU"
    module, function = arguments[0].split(":")
    for switch in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        getattr(torch.backends.cuda, switch)(False)
    torch.backends.cudnn.enabled = False
    torch.nn.Parameter.__repr__ = object.__repr__  # type: ignore[method-assign]  # DeepSpeed logs weights: minutes here
    flops._size = lambda _: 64  # of the products that say how fast a GPU is
    backends._triton_refuses = lambda *_, **__: NO_TRITON
    language_loss._missing = lambda: NO_TRITON
    with ComputedOnTheCPU():
        return getattr(importlib.import_module(module), function)(list(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
