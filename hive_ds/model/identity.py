"""Which weights these are: one hash of a vision tower's tensors, wherever the tower is kept.

It is equal for the tower in training, its exported folder (sharded or not), that folder loaded again, and the tower
inside of a HIVE or LLaVA-style model, under transformers 4 and 5. A hash of files would not be: shards and metadata
change with every save. Weights in another dtype are other weights: the bf16 copy of an fp32 tower has another hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hive_ds.errors import HiveError

TOWER_PREFIX = re.compile(r"(model\.)?(vision_encoder|vision_tower)\.")
"""Before a tower's names in a HIVE model and in a LLaVA-style one."""


def weights_sha256(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of a vision tower's weights: names, dtypes, shapes and bytes, in whatever order they come.

    Args:
        weights: names and whole tensors, as ``encoder.state_dict().items()`` or `read_tower`; tensors are read one at
            a time and not kept. Where any name lies in a HIVE or LLaVA-style model, only names of its tower count.

    Raises:
        HiveError: there are none.
    """
    lines, tower_lines = [], []
    for name, tensor in weights:
        line = (
            f"{canonical_name(name)} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(_bytes(tensor)).hexdigest()}"
        )
        (tower_lines if TOWER_PREFIX.match(name) else lines).append(line)
    chosen = sorted(tower_lines or lines)
    if not chosen:
        raise HiveError("no weights to hash; expected those of a vision tower")
    return hashlib.sha256("\n".join(chosen).encode()).hexdigest()


def folder_sha256(folder: str | Path) -> str:
    """`weights_sha256` of the tower in a saved encoder, HIVE model or LLaVA-style model; reads no other weights.

    Raises:
        HiveError: no safetensors in the folder.
    """
    return weights_sha256(read_tower(folder))


def read_tower(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the vision tower in a folder, one at a time, as they are named there.

    Raises:
        HiveError: no safetensors in the folder.
    """
    files = weight_files(Path(folder))
    whole = any(TOWER_PREFIX.match(name) for file in files for name in _names(file))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if TOWER_PREFIX.match(name) or not whole:
                    yield name, tensors.get_tensor(name)


def canonical_name(name: str) -> str:
    """Name of a tower's tensor within the tower, as transformers 5 has it (4 nests SigLIP and CLIP one level deeper)."""
    return TOWER_PREFIX.sub("", name, count=1).removeprefix("vision_model.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, sharded or not.

    Raises:
        HiveError: there are none.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise HiveError(f"{folder} holds no model.safetensors; expected a folder saved by an earlier stage")


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
