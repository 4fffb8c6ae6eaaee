"""Settings of every test: no network, no accelerator unless asked for, one thread a process."""

from __future__ import annotations

import os

# Set before torch, transformers or deepspeed is imported anywhere; subprocesses inherit them.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
}.items():
    os.environ.setdefault(name, value)
