"""A checkpoint to evaluate: model, processor, and the hashes that tell which weights were judged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from hive_ds.export import model_folder
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.processing import HiveProcessor


def load_checkpoint(source: str | Path, *, dtype: str = "auto") -> tuple[Any, Any]:
    """Model and processor of a model's folder or of a run's last finished stage.

    Args:
        source: the folder.
        dtype: of the weights, as ``bfloat16``; ``auto`` is what they were saved in.

    Raises:
        HiveError: there is no model.
    """
    folder = model_folder(source)
    model = HiveForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, HiveProcessor.from_pretrained(folder)


def weights_sha256(module: torch.nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of the names.

    It does not depend on how files hold them, but on the dtype that they were loaded in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
