"""Settings of every test: no network, no accelerator unless asked for, one thread a process."""

from __future__ import annotations

import os
from pathlib import Path

# Set before torch, transformers or deepspeed is imported anywhere; subprocesses inherit them.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    # Without a GPU the Triton kernels run under Triton's interpreter, which is chosen when they are imported.
    "TRITON_INTERPRET": "0" if any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd")) else "1",
}.items():
    os.environ.setdefault(name, value)
