"""Compiling the kernels without running them: for a GPU that is not there, to see registers and spills."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .tiles import choose_tile
from .triton_backward import (
    hierarchical_attention_key_gradient_kernel,
    hierarchical_attention_query_gradient_kernel,
)
from .triton_forward import hierarchical_attention_forward_kernel
from .triton_launch import attention_settings
from .triton_short import hierarchical_attention_short_gradient_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS: dict[str, Any] = {
    "forward short": hierarchical_attention_forward_kernel,
    "forward": hierarchical_attention_forward_kernel,
    "decode": hierarchical_attention_forward_kernel,
    "backward short": hierarchical_attention_short_gradient_kernel,
    "keys": hierarchical_attention_key_gradient_kernel,
    "queries": hierarchical_attention_query_gradient_kernel,
}
HEADS, GROUPS = 6, 2
IN_FP32 = (
    "lse", "dlse", "delta", "cos", "sin", "q_cos", "q_sin", "image_cos", "image_sin", "q_weight", "k_weight",
    "partials", "q_partials", "k_partials",
)  # fmt: skip
IN_INT32 = ("work", "samples", "seen", "first_token")


@dataclass(frozen=True)
class Compiled:
    """What one kernel came out as."""

    kind: str
    target: str
    head_dim: int
    assembly: str
    """PTX, or AMD assembly."""
    binary: bytes
    shared: int
    """Bytes of shared memory a program."""


def compile_kernel(kind: str, target: str, head_dim: int) -> Compiled | None:
    """Compile one kernel of the tile table in bf16, norm and rotation inside; None if the table has none such."""
    tile = choose_tile(target, head_dim, kind, torch.bfloat16)
    if tile.rows == 0:
        return None
    kernel = KERNELS[kind]
    own = {"FINISH_KEYS": kind == "forward short", "CACHE": kind == "decode", "DLSE": False}
    values = attention_settings(HEADS, GROUPS, head_dim, "pre_rope", True, tile, **own).values
    names = kernel.arg_names
    constants = {name: value for name, value in values.items() if name in names}
    signature = {name: _type(name, constants) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if _aligned(name, signature[name])}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    forms = compiled.asm
    assembly, binary = ("ptx", "cubin") if target.startswith("sm") else ("amdgcn", "hsaco")
    return Compiled(kind, target, head_dim, forms[assembly], forms[binary], compiled.metadata.shared)


def _type(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in IN_INT32:
        return "*i32"
    if name in ("scale", "eps"):
        return "fp32"
    if name.startswith(("stride", "cache")):
        return "i32"
    return "*fp32" if name in IN_FP32 else "*bf16"


def _aligned(name: str, kind: str) -> bool:
    return (kind.startswith("*") and name not in IN_INT32) or name.startswith(("stride", "cache"))


def resources(compiled: Compiled) -> dict[str, int]:
    """Registers a thread and bytes of stack (spilled registers), as the assembler reports them."""
    if not compiled.target.startswith("sm"):
        found = [re.search(rf"\.{name}:\s*(\d+)", compiled.assembly) for name in ("vgpr_count", "vgpr_spill_count")]
        registers, spilled = (int(match[1]) if match else 0 for match in found)
        return {"registers": registers, "stack": 4 * spilled}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert match is not None, report
    return {"registers": int(match[1]), "stack": int(match[2])}


def main() -> None:
    """Print one line of JSON for each kernel, those of the architectures and head dims named as arguments."""
    targets = [name for name in sys.argv[1:] if name in TARGETS] or list(TARGETS)
    kinds = [name for name in sys.argv[1:] if name in KERNELS] or list(KERNELS)
    head_dims = [int(name) for name in sys.argv[1:] if name.isdigit()] or [64, 128]
    for target, kind, head_dim in product(targets, kinds, head_dims):
        compiled = compile_kernel(kind, target, head_dim)
        if compiled is not None:
            names = {"target": target, "kind": kind, "head_dim": head_dim, "shared": compiled.shared}
            print(json.dumps(names | resources(compiled)), flush=True)


if __name__ == "__main__":
    main()
