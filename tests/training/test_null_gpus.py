"""Ranks on GPUs train as ranks on CPUs do: NCCL, CUDA's allocator, DeepSpeed's ways for GPUs; the CPU computes.

See `null_gpu/computed.py`. What a GPU's kernels compute, and in which order streams run, it cannot show.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from forked import Ended
from ranks import check_names, launch_checks, passed
from safetensors.torch import load_file
from test_null_gpu import NULL_GPU, pytestmark  # noqa: F401
from tiny_run import TinyRun

OF_CPUS = {
    "engine_checks.check_ranks_on_cpus_see_no_gpu",
    "engine_checks.check_imports_are_left_out_of_collections",
    "engine_checks.check_compiled_layers_under_zero3",
}
LAUNCHES = [
    [name for name in check_names(*modules) if name not in OF_CPUS]
    for modules in (
        ("engine_checks",),
        ("zero_checks", "cascaded_checks"),
        ("checkpoint_checks", "loop_checks"),
        ("save_checks", "maps_checks", "micro_batch_checks", "start_checks"),
    )
]

FP32, BF16 = {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 2e-2, "atol": 2e-3}
"""Of numbers that checks return, as in `test_engine`."""
Run = Callable[[str, Sequence[str], Mapping[str, str], int, float], Ended]


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run_forked`, on null GPUs that compute."""
    sys.path.insert(0, str(NULL_GPU))
    import build

    folder = tmp_path_factory.mktemp("null_gpus")
    variables = build.environment(folder) | {"DS_ACCELERATOR": "cuda", "NULL_GPU_COMPUTES": "1"}

    def run(entry: str, arguments: Sequence[str], env: Mapping[str, str], num_ranks: int, timeout: float) -> Ended:
        launch = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(num_ranks)]
        command = [*launch, str(NULL_GPU / "computed.py"), entry, *arguments]
        variables["NULL_GPUS"] = str(num_ranks)
        done = subprocess.run(command, env={**env, **variables}, capture_output=True, text=True, timeout=timeout)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.mark.parametrize("names", LAUNCHES, ids=lambda names: names[0].partition(".")[0])
def test_on_two_ranks(names: list[str], on_gpus: Run, tmp_path: Path) -> None:
    found = {name: passed(verdict) for name, verdict in launch_checks(names, 2, tmp_path / "gpus", on_gpus).items()}
    told = [name for name, value in found.items() if value is not None]  # losses, gradient norms, tokens
    for name, verdict in launch_checks(told, 2, tmp_path / "cpus").items() if told else ():
        torch.testing.assert_close(found[name], passed(verdict), **(BF16 if "bf16" in name else FP32))


def test_stages_on_two_gpus_equal_those_on_two_cpus(tiny: TinyRun, on_gpus: Run) -> None:
    for stage in (1, 2, 3):
        tiny.train_forked(stage, "cpus")
        arguments = tiny.arguments(stage, "gpus", "--set", "data.num_workers=1")
        done = on_gpus("hive_ds.train:main", arguments, tiny.environment(), 2, 600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stderr
        assert tiny.metrics("gpus", stage, "start")[0]["device"] == "null GPU"
        lines = [[line["loss"] for line in tiny.metrics(run, stage, "train")] for run in ("cpus", "gpus")]
        torch.testing.assert_close(*map(torch.tensor, lines), rtol=1e-5, atol=0)
        torch.testing.assert_close(*(weights(tiny, run, stage) for run in ("cpus", "gpus")), rtol=0, atol=1e-5)


def weights(tiny: TinyRun, run: str, stage: int) -> dict[str, torch.Tensor]:
    """All but the biases of keys: softmax cancels them, so that their gradients are rounding, of any sign."""
    path = Path(tiny.root, run, f"stage{stage}", "model", "model.safetensors")
    return {name: x for name, x in load_file(path).items() if not name.endswith("k_proj.bias")}
