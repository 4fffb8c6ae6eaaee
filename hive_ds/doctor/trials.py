"""What only trying shows: an all-reduce, GPUs that multiply, a Triton kernel; in other processes, which may hang.

    python -m hive_ds.doctor.trials FOLDER RANK RANKS GPUS

The ranks reduce together; then the first tries the GPUs and the last the kernel. Each prints a JSON object a trial.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from hive_ds.doctor.findings import Finding, Status
from hive_ds.doctor.machine import CPU_RANKS

AREA = "trials"
PATIENCE = 45.0
"""Seconds for all trials together: imports alone take 10 on a busy machine, and the doctor less than a minute."""
REDUCE, GPUS, KERNEL = "all-reduce", "GPUs", "Triton kernel"
SIZE = 4 << 20
"""Bytes that are reduced: enough to see that it works."""
ADVICE = {
    REDUCE: "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to a network that is up; NCCL_DEBUG=INFO says more",
    GPUS: "update the driver to one for torch's CUDA version, or reset the GPU that is named",
    KERNEL: "train without it: --set model.attention_backend=sdpa --set model.text_attention_backend=sdpa",
}


def check_trials(gpus: int, patience: float = PATIENCE) -> Iterator[Finding]:
    """Try everything, with one rank a GPU, or two on the CPU."""
    ranks = gpus or CPU_RANKS
    with TemporaryDirectory(prefix="hive-doctor-") as name:
        folder = Path(name)
        processes = [_start(folder, rank, ranks, gpus) for rank in range(ranks)]
        deadline = time.monotonic() + patience
        try:
            for process in processes:
                process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()
        yield from _read(folder, bool(gpus), patience)


def _start(folder: Path, rank: int, ranks: int, gpus: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hive_ds.doctor.trials", str(folder), str(rank), str(ranks), str(gpus)]
    with (folder / f"out-{rank}").open("w") as out, (folder / f"err-{rank}").open("w") as err:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def _read(folder: Path, with_gpus: bool, patience: float) -> Iterator[Finding]:
    said: dict[str, dict[str, str]] = {}
    for file in folder.glob("out-*"):
        lines = [json.loads(line) for line in _lines(file) if line.startswith('{"trial"')]
        said |= {line["trial"]: line for line in lines if "error" in line or "error" not in said.get(line["trial"], {})}
    for name in (REDUCE, *((GPUS,) if with_gpus else ()), KERNEL):
        # Without a GPU, training takes torch's attention.
        trouble: Status = "warning" if name == KERNEL and not with_gpus else "problem"
        if name not in said:
            fault = f"no answer within {patience:.0f} s, or a crash: {_last_words(folder)}"
            yield Finding(AREA, name, trouble, fault, ADVICE[name])
        elif "error" in said[name]:
            yield Finding(AREA, name, trouble, said[name]["error"], ADVICE[name])
        else:
            yield Finding(AREA, name, "ok", said[name]["said"])


def _last_words(folder: Path) -> str:
    errors = [line for file in sorted(folder.glob("err-*")) for line in _lines(file)[-1:]]
    return "; ".join(errors) or "it said nothing"


def _lines(file: Path) -> list[str]:
    """Text, whatever bytes a driver has put between."""
    return file.read_text(errors="replace").strip().splitlines()


def main(folder: Path, rank: int, ranks: int, gpus: int) -> None:
    """Take part as one rank, on a machine that shows so many GPUs."""
    _say(REDUCE, lambda: _reduce(folder, rank, ranks, gpus))
    if rank == 0 and gpus:
        _say(GPUS, lambda: _multiply(gpus))
    if rank == ranks - 1:
        _say(KERNEL, lambda: _attend("cuda" if gpus else "cpu"))


def _say(trial: str, work: Callable[[], str]) -> None:
    try:
        result = {"said": work()}
    except Exception as error:  # whatever a driver, compiler or network throws is what we are looking for
        result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    print(json.dumps({"trial": trial, **result}), flush=True)


def _reduce(folder: Path, rank: int, ranks: int, gpus: int) -> str:
    import socket
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from hive_ds.launch.network import choose_interface
    from hive_ds.launch.preflight_network import all_reduce_rate

    choose_interface(os.environ, socket.gethostname())
    if torch.cuda.device_count() < gpus:
        raise RuntimeError(f"torch sees {torch.cuda.device_count()} of {gpus} GPUs")
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    store = dist.FileStore(str(folder / "store"), ranks)
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(ranks)], timedelta(seconds=PATIENCE))
    rate = all_reduce_rate(store, rank, ranks, device, size=SIZE)
    backend = "NCCL" if device.type == "cuda" else "gloo"
    return f"{ranks} ranks over {backend}, {rate / 1e9:.2f} GB/s"


def _multiply(gpus: int) -> str:
    import torch

    from hive_ds.launch.preflight import try_gpus

    rates: list[float] = []
    faults = list(try_gpus(gpus, rates))
    if faults:
        raise RuntimeError("; ".join(faults))
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(index) for index in range(gpus)))
    return f"{gpus} x {names} (CUDA {torch.version.cuda}), {min(rates) / 1e12:.0f} TFLOP/s or more each"


def _attend(device: str) -> str:
    """Our own attention kernel against the reference; without a GPU under Triton's interpreter."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # looked at when the kernels are imported
    import torch

    from hive_ds.kernels import AttentionLayout, hierarchical_attention

    layout = AttentionLayout.build([5, 3], [[4], []], [[1], []], device=device)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8, heads, 16, generator=generator).to(device) for heads in (2, 1, 1))
    image_k, image_v = (torch.randn(4, 1, 16, generator=generator).to(device) for _ in range(2))
    ours, expected = (
        hierarchical_attention(q, k, v, image_k, image_v, layout, backend=backend)
        for backend in ("triton", "reference")
    )
    assert isinstance(ours, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    worst = float((ours - expected).abs().max())
    if not worst < 1e-2:
        raise RuntimeError(f"the kernel is off the reference by {worst:.2g}")
    how = "interpreted (no GPU)" if device == "cpu" else "compiled"
    return f"{how}, and equal to the reference"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
