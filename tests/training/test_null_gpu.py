"""The ways of the step benchmark on a GPU that computes nothing: each compiles for a GPU, and nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

NULL_GPU = Path(__file__).resolve().parents[1] / "null_gpu"

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler: apt-get install gcc"),
    pytest.mark.skipif(torch.version.cuda is None or torch.version.cuda < "13", reason="needs PyTorch for CUDA 13"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU: make gpu-suite PART=stage3"),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, Any]]:
    sys.path.insert(0, str(NULL_GPU))
    import build

    variables = build.environment(tmp_path_factory.mktemp("null_gpu"))

    def run(way: str, stage: int) -> dict[str, Any]:
        command = [sys.executable, str(NULL_GPU / "steps.py"), "tiny", str(stage), way, "4"]
        environment = os.environ | variables | {"DS_ACCELERATOR": "cuda"}  # the tests' own is the CPU
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    ("way", "stage"), [("ours compiled", 1), ("ours compiled", 3), ("ours flash", 3), ("ours zero3", 3)]
)
def test_ours_compiles_for_a_gpu_once(steps: Callable[[str, int], dict[str, Any]], way: str, stage: int) -> None:
    found = steps(way, stage)
    assert found["graphs"] > 0
    assert found["graphs_later"] == 0
    assert found["launches"] > found["products"] > 0
    check_waits(found, engine=way == "ours zero3")


@pytest.mark.parametrize("way", ["paper", "sa", "sa packed"])
def test_peers_compile_for_a_gpu(steps: Callable[[str, int], dict[str, Any]], way: str) -> None:
    found = steps(way, 3)
    assert found["graphs"] > 0
    assert found["graphs_later"] <= 2  # their padded shapes coincide now and then
    check_waits(found, plain_loss=way == "paper")


def check_waits(found: dict[str, Any], *, plain_loss: bool = False, engine: bool = False) -> None:
    """Of a step: Liger-Kernel waits three times and copies a number that is not pinned; the engine waits at its end."""
    if not engine:
        assert (found["waits"], found["pageable"]) == ((0, 0) if plain_loss else (3, 1))
