"""Build the null GPU (`null_gpu.c`) for the PyTorch that is installed, and say how a process gets to see it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

GPU, NCCL = (Path(__file__).with_name(name) for name in ("null_gpu.c", "nccl.c"))
RUNTIME, DRIVER = re.compile(r"_*cuda[A-Z]\w*|cublas[A-Z]\w*|nccl[A-Z]\w*"), re.compile(r"cu[A-Z]\w*")


def environment(folder: Path) -> dict[str, str]:
    """Build into ``folder``; variables of a process whose PyTorch then finds a GPU, or $NULL_GPUS, H200 by their shape.

    Raises:
        FileNotFoundError: no C compiler, or PyTorch is not one for CUDA 13.
    """
    packages = Path(str(importlib.util.find_spec("torch").origin)).parents[1]  # type: ignore[union-attr]
    headers = packages / "nvidia" / "cu13" / "include"
    triton = packages / "triton" / "backends" / "nvidia"
    for needed in (headers / "cuda_runtime_api.h", triton / "include" / "crt" / "host_defines.h"):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing; expected PyTorch for CUDA 13 with Triton")
    wanted = set()
    for library in (packages / "torch" / "lib").glob("*.so"):
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        wanted |= {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    includes = [f"-I{headers}", f"-I{triton / 'include'}"]
    _build(folder / "libnull_gpu.so", (name for name in wanted if RUNTIME.fullmatch(name)), [GPU, NCCL, *includes])
    named = DRIVER.findall((triton / "driver.c").read_text() + (triton / "driver.py").read_text())
    driver = [*named, *(name for name in wanted if DRIVER.fullmatch(name) and not name.startswith("cuda"))]
    _build(folder / "libcuda.so.1", driver, [GPU, *includes, "-DDRIVER", "-Wl,-soname,libcuda.so.1"])
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    return {
        "LD_PRELOAD": str(folder / "libnull_gpu.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_INTERPRET": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def _build(library: Path, wanted: Iterable[str], flags: list[str | Path]) -> None:
    """Compile the sources, and with them a function that returns 0 for each wanted one that they lack."""
    command = ["gcc", "-O2", "-shared", "-fPIC", "-w", "-o", library, *flags]
    subprocess.run(command, check=True)
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    made = {line.split()[-1] for line in listed.stdout.splitlines()}
    rest = library.with_suffix(".c")
    rest.write_text("".join(f"long {name}() {{ return 0; }}\n" for name in sorted(set(wanted) - made)))
    subprocess.run([*command, rest], check=True)
