"""A GPU that computes nothing: the ways of the step benchmark compile for it, once, and memory is as forecast."""

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

from hive_ds.cost.counted import watch_step
from hive_ds.cost.ledger import cost_of_stage
from hive_ds.cost.model import meta_model
from hive_ds.cost.workload import Workload
from hive_ds.recipe import dump_recipe, load_recipe

NULL_GPU = Path(__file__).resolve().parents[1] / "null_gpu"
PAPER, SA = "hive-siglip-l-mobilellm-600m", "sa-siglip-l-mobilellm-600m"

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler: apt-get install gcc"),
    pytest.mark.skipif(torch.version.cuda is None or torch.version.cuda < "13", reason="needs PyTorch for CUDA 13"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU: make gpu-suite PART=stage3"),
]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run a script of the null GPU's folder; returns the JSON that it prints."""
    sys.path.insert(0, str(NULL_GPU))
    import build

    variables = build.environment(tmp_path_factory.mktemp("null_gpu"))

    def run(name: str, *arguments: object) -> dict[str, Any]:
        command = [sys.executable, str(NULL_GPU / name), *map(str, arguments)]
        environment = os.environ | variables | {"DS_ACCELERATOR": "cuda"}  # the tests' own is the CPU
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    ("way", "stage"), [("ours compiled", 1), ("ours compiled", 3), ("ours flash", 3), ("ours zero3", 3)]
)
def test_ours_compiles_for_a_gpu_once(script: Callable[..., dict[str, Any]], way: str, stage: int) -> None:
    found = script("steps.py", "tiny", stage, way, 4)
    assert found["graphs"] > 0
    assert found["graphs_later"] == 0
    assert found["launches"] > found["products"] > 0
    check_waits(found, engine=way == "ours zero3")


@pytest.mark.parametrize("way", ["paper", "sa", "sa packed"])
def test_peers_compile_for_a_gpu(script: Callable[..., dict[str, Any]], way: str) -> None:
    found = script("steps.py", "tiny", 3, way, 4)
    assert found["graphs"] > 0
    assert found["graphs_later"] <= 2  # their padded shapes coincide now and then
    check_waits(found, plain_loss=way == "paper")


@pytest.mark.parametrize(("recipe", "stage"), [(PAPER, 1), (PAPER, 3), (SA, 3)])
def test_pytorch_hands_out_what_the_forecast_says(
    script: Callable[..., dict[str, Any]], recipe: str, stage: int
) -> None:
    """`hive-ds cost` counts on the meta device; here CUDA's allocator is asked, at the paper's size."""
    model, _ = meta_model(load_recipe(recipe), stage)
    found = script("memory.py", recipe, stage, 32, 128)
    assert found["bytes"] == pytest.approx(watch_step(model, Workload(32, 128)).peak, rel=0.005)


@pytest.mark.parametrize("policy", ["zero0", "zero1", "zero2", "zero3"])
def test_deepspeed_takes_what_the_forecast_says(
    script: Callable[..., dict[str, Any]], tmp_path: Path, policy: str
) -> None:
    """Weights, optimizer and activations as counted; ZeRO's buffers are in the forecast at their most."""
    recipe = load_recipe(PAPER, [f"training.ds_config={policy}"])
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    found = script("engine_memory.py", file, 3, 32, 128)["bytes"]
    forecast = cost_of_stage(recipe, 3, text_length=128, batch=32, ranks=1)
    assert forecast.peak - forecast.memory["zero_buffers"] < 1.02 * found
    assert found < 1.01 * forecast.peak


def check_waits(found: dict[str, Any], *, plain_loss: bool = False, engine: bool = False) -> None:
    """Of a step: Liger-Kernel waits three times and copies a number that is not pinned; the engine waits at its end."""
    if not engine:
        assert (found["waits"], found["pageable"]) == ((0, 0) if plain_loss else (3, 1))
