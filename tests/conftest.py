"""Settings of every test: no network, no accelerator unless asked for, one thread a process."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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

HERE = Path(__file__).parent
FIRST = (
    *("cluster/test_slurm_scripts", "training/test_engine", "cluster/test_preflight", "training/test_loop_on_ranks"),
    *("cluster/test_ssh_hosts", "training/test_faults", "training/test_watchdog", "training/test_train_command"),
    *("kernels/test_benchmarks", "training/test_step_benchmark", "quickstart/test_quickstart"),
    *("training/test_elastic", "training/test_communication", "training/test_kills"),
    *("model/test_compiling", "kernels/test_triton"),
)
"""Files of minutes begin first, so that two workers end together: one waits, for Slurm or a hang, while the other's
ranks use both cores."""

FEW_COLLECTIONS = (20_000, 20, 20)
"""Thresholds of garbage collections: Python's own, of 700 objects, take a tenth of the time of interpreted kernels."""


def pytest_sessionstart() -> None:
    """Nothing that is imported becomes garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Collections look through what tests make, and no longer through all that was imported."""
    gc.freeze()
    gc.set_threshold(*FEW_COLLECTIONS)
    gc.enable()


def pytest_unconfigure() -> None:
    """Triton 3.9 takes what is still frozen when Python ends for leaked, and prints so."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of `FIRST` in that order, then all others as they were."""
    places = {HERE / f"{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(FIRST)))


@pytest.fixture
def forkserver_by_default() -> Iterator[None]:
    """Processes start as Python 3.14 starts them where nothing else is asked for."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(usual, force=True)
