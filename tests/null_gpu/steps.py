"""Steps of one of the benchmark's ways on the null GPU: ``python steps.py SIZE STAGE WAY STEPS``; a line of JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from typing import Any

import torch
from torch._dynamo.utils import counters

from hive_ds.benchmarks import arms
from hive_ds.benchmarks.sizes import PAPER, TINY, caption_lengths, make_batch
from hive_ds.benchmarks.step import PROBES

CAPTIONS = {"paper": 32, "tiny": 4}
"""Of a batch: few, so that the host limits."""


def main() -> None:
    """Build, compile, run a few steps, and then those that count."""
    size, stage, way, steps = (
        {"paper": PAPER, "tiny": TINY}[sys.argv[1]],
        int(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]),
    )
    leave_out_what_is_not_there()
    arms.compared = lambda *_: "passed"  # there is nothing to compare
    device = torch.device("cuda")
    made = arms.build_arm(way, arms.Setting(size, stage, device, compiled=True), [batch(size, n, 9) for n in PROBES])
    step, batches = made.stepper.step, [batch(size, CAPTIONS[sys.argv[1]], seed) for seed in range(2)]
    for warm in (*batches, batch(size, CAPTIONS[sys.argv[1]] + 1, 2), *batches):
        step(warm)
    gc.freeze()
    torch.cuda.reset_peak_memory_stats()
    before, graphs, times = counts(), counters["stats"]["unique_graphs"], []
    for index in range(steps):
        start = time.perf_counter()
        step(batches[index % 2])
        times.append(time.perf_counter() - start)
    counted = {name: (now - before[name]) / steps for name, now in counts().items()}
    fresh = batch(size, CAPTIONS[sys.argv[1]] + 3, 7)  # lengths that were not seen before
    step(fresh)
    found: dict[str, Any] = {
        "way": way,
        "stage": stage,
        "milliseconds": [round(seconds * 1e3, 2) for seconds in times],
        **counted,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "graphs": graphs,
        "graphs_later": counters["stats"]["unique_graphs"] - graphs,
    }
    made.close()
    print(json.dumps(found), flush=True)


def leave_out_what_is_not_there() -> None:
    """cuDNN and kernels that PyTorch compiles at run time are not the null GPU's; both are one call a step or less.

    DeepSpeed logs weights, which are noise.
    """
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.Tensor.erfinv_ = lambda self: self  # type: ignore[method-assign]
    torch.nn.Parameter.__repr__ = object.__repr__  # type: ignore[method-assign]


def batch(size: Any, captions: int, seed: int) -> Any:
    """Captions of the lengths that real ones have."""
    return make_batch(size, caption_lengths(size, captions, seed), seed)


def counts() -> dict[str, int]:
    """Kernels that were launched so far, matrix products, waits of the host, copies from memory that is not pinned."""
    library = ctypes.CDLL("libnull_gpu.so")
    names = ("launches", "products", "waits", "pageable")
    return {name: ctypes.c_long.in_dll(library, f"null_gpu_{name}").value for name in names}


if __name__ == "__main__":
    main()
