"""Which weights these are: one hash of a vision tower's tensors, wherever the tower is kept.

It is equal for the tower in training, its exported folder (sharded or not), that folder loaded again, and the tower
inside of a HIVE or LLaVA-style model, under transformers 4 and 5. A hash of files would not be: shards and metadata
change with every save. Values count as bf16: an fp32 tower that a later stage keeps frozen in bf16 is still that tower.
So changes below the precision of bf16 do not show; training changes far more.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hive_ds.errors import HiveError, told_as

TOWER_PREFIX = re.compile(r"(model\.)?(vision_encoder|vision_tower)\.")
"""Before a tower's names in a HIVE model and in a LLaVA-style one."""
RENAMES = (
    (r"^vision_model\.", ""),
    (r"^layer\.", "model.layer."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)
"""From names of transformers 4 to those of 5: SigLIP and CLIP one level deeper, DINOv3 one less, DINOv2's own words"""


def weights_sha256(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.bfloat16) -> str:
    """Hash of a vision tower's weights: names, shapes and values in ``dtype``, in whatever order and dtype they come.

    Args:
        weights: names and whole tensors, as ``encoder.state_dict().items()`` or `read_tower`; tensors are read one at
            a time and not kept. Where any name lies in a HIVE or LLaVA-style model, only names of its tower count.
        dtype: fp32 tells every value from another; such a hash says no more that a tower was rounded to bf16 only.

    Raises:
        HiveError: there are none.
    """
    lines: dict[bool, list[str]] = {True: [], False: []}
    for name, tensor in weights:
        in_whole_model = TOWER_PREFIX.match(name) is not None
        for part, values in canonical_parts(name, tensor):
            digest = hashlib.sha256(_bytes(values, dtype)).hexdigest()
            lines[in_whole_model].append(f"{part} {tuple(values.shape)} {digest}")
    chosen = sorted(lines[True] or lines[False])
    if not chosen:
        raise HiveError("no weights to hash; expected those of a vision tower")
    return hashlib.sha256("\n".join(chosen).encode()).hexdigest()


def folder_sha256(folder: str | Path) -> str:
    """`weights_sha256` of the tower in a saved encoder, HIVE model or LLaVA-style model; reads no other weights.

    Raises:
        HiveError: no safetensors in the folder.
    """
    return weights_sha256(read_tower(folder))


def model_sha256(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of the names.

    It does not depend on how files hold them, but on the dtype that they were loaded in, or would be: ``dtype``.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_tower(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the vision tower in a folder, one at a time, as they are named there.

    Raises:
        HiveError: no safetensors in the folder.
    """
    files = weight_files(Path(folder))
    whole = any(TOWER_PREFIX.match(name) for file in files for name in _names(file))
    for file in files:
        with open_weights(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if TOWER_PREFIX.match(name) or not whole:
                    yield name, tensors.get_tensor(name)


def canonical_parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tower's tensor under its `canonical_names`."""
    names = canonical_names(name)
    return list(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True))


def canonical_names(name: str) -> list[str]:
    """Names within the tower as transformers 5 has them in memory; it keeps one tensor of transformers 4 as two."""
    name = TOWER_PREFIX.sub("", name, count=1)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    if ".mlp.weights_in." in name:
        return [name.replace("weights_in", part) for part in ("gate_proj", "up_proj")]
    return [name]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, sharded or not.

    Raises:
        HiveError: there are none.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with told_as(str(index), "the names of files of weights, by tensor"):
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise HiveError(f"{folder} holds no model.safetensors; expected a folder saved by an earlier stage")


def open_weights(file: Path) -> Any:
    """safetensors' ``safe_open``; HiveError, naming the file, where it is not there, cut off or something else."""
    with told_as(f"{file} cannot be read", "a whole file of safetensors"):
        return safe_open(file, framework="pt")


def _names(file: Path) -> list[str]:
    with open_weights(file) as tensors:
        return list(tensors.keys())


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    return tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
