"""Is a node fit to train on? The job scripts ask every node of a job before they start the trainer.

    python -m hive_ds.launch.preflight node    --out FOLDER ...    each node by itself
    python -m hive_ds.launch.preflight network --out FOLDER ...    those that passed, together

One process a node. It writes what it found to FOLDER/NODE.json, and FOLDER/NODE.fault, a line a fault, if there is any;
a node without either file never got that far. Scripts read those files, so that a node can fail in any way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hive_ds.launch.probe import SHM_PER_RANK, free, versions

ROOM = 10**9
"""Free bytes without which a folder counts as full."""

_WRITTEN = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part on this node; returns 0, whatever it found."""
    options = _parse(arguments)
    if options.part == "network":
        from hive_ds.launch.preflight_network import check_network

        check_network(options.out, options.nodes.split(","), options.port)
        return 0
    started = time.monotonic()
    values, faults = check_node(options)
    values["seconds"] = round(time.monotonic() - started, 2)
    if faults:
        write_faults(options.out, node_name(), faults)
    (options.out / f"{node_name()}.json").write_text(json.dumps(values, indent=2) + "\n")
    return 0


def node_name() -> str:
    """This node, as Slurm calls it."""
    return os.environ["SLURMD_NODENAME"]


def write_faults(out: Path, node: str, faults: Sequence[str]) -> None:
    """Write what makes a node unfit, a line a fault."""
    (out / f"{node}.fault").write_text("".join(f"{fault}\n" for fault in faults))


def check_node(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What this node has, and what is wrong with it."""
    faults = []
    values: dict[str, Any] = {"versions": versions(), "shm_free": free("/dev/shm")}
    needed = options.ranks * SHM_PER_RANK
    if values["shm_free"] is None or values["shm_free"] < needed:
        faults.append(f"/dev/shm has {gigabytes(values['shm_free'])}; {options.ranks} ranks need {gigabytes(needed)}")
    for name, folder in (("scratch", options.scratch), ("run", options.run)):
        values[f"{name}_free"], fault = try_to_write(folder)
        faults += [fault] if fault else []
    if options.gpus and os.environ.get("DS_ACCELERATOR") != "cpu":
        rates: list[float] = []
        faults += try_gpus(options.gpus, rates)
        values["matmul_flops_per_second"] = rates
    return values, faults


def try_to_write(folder: Path) -> tuple[int | None, str | None]:
    """Free bytes of a folder's disk, and why it is of no use."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_WRITTEN))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return None, f"cannot write to {folder}: {error.strerror}"
    space = shutil.disk_usage(folder).free
    return space, None if space >= ROOM else f"{folder} has {gigabytes(space)} free; expected {gigabytes(ROOM)}"


def try_gpus(expected: int, rates: list[float]) -> Iterator[str]:
    """Faults of this node's GPUs; appends each one's FLOPs per second to ``rates``."""
    import torch

    if torch.cuda.device_count() < expected:
        yield f"{torch.cuda.device_count()} GPUs work of {expected}"
    for index in range(torch.cuda.device_count()):
        try:
            rates.append(_matmul(torch.device("cuda", index)))
        except RuntimeError as error:
            yield f"GPU {index}: {str(error).splitlines()[0]}"


def _matmul(device: Any, size: int = 8192) -> float:
    """FLOPs per second of a matrix product whose result is known; RuntimeError where it is another."""
    import torch

    ones = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        product = ones @ ones
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if not bool((product == size).all()):
            raise RuntimeError("a matrix product is wrong")
    return 2 * size**3 / best


def gigabytes(count: float | None) -> str:
    """Bytes as text; None is a folder that cannot be written to."""
    return "nothing that can be written to" if count is None else f"{count / 10**9:.2f} GB"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hive_ds.launch.preflight", description="Is this node fit to train on?")
    parts = parser.add_subparsers(dest="part", required=True)
    node = parts.add_parser("node", help="this node by itself")
    node.add_argument("--ranks", type=int, required=True, help="processes it is to run")
    node.add_argument("--gpus", type=int, required=True, help="GPUs it should have")
    node.add_argument("--scratch", type=Path, required=True, help="node-local folder")
    node.add_argument("--run", type=Path, required=True, help="folder of the run, shared")
    network = parts.add_parser("network", help="all nodes together")
    network.add_argument("--nodes", required=True, help="their names, with commas; they meet on the first")
    network.add_argument("--port", type=int, required=True, help="a free port of the first node")
    for part in (node, network):
        part.add_argument("--out", type=Path, required=True, help="folder for the reports")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
