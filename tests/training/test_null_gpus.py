"""Ranks on GPUs train as ranks on CPUs do: NCCL, CUDA's allocator, DeepSpeed's streams; the CPU computes.

See `null_gpu/computed.py`. What a GPU's kernels compute, and in which order streams run, it cannot show.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from forked import Ended
from ranks import Verdict, check_names, launch_checks, passed
from safetensors.torch import load_file
from test_null_gpu import NULL_GPU, pytestmark  # noqa: F401
from tiny_run import TinyRun

OF_CPUS = {
    "engine_checks.check_ranks_on_cpus_see_no_gpu",
    "engine_checks.check_imports_are_left_out_of_collections",
    "engine_checks.check_compiled_layers_under_zero3",
}
CHECKS = [
    name
    for name in check_names("engine_checks", "zero_checks", "cascaded_checks", "checkpoint_checks", "loop_checks")
    if name not in OF_CPUS
]
PLAIN = ("--set", "model.attention_backend=sdpa", "--set", "model.text_attention_backend=sdpa")

Run = Callable[[str, Sequence[str], Mapping[str, str], int, float], Ended]


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run_forked`, on null GPUs that compute."""
    sys.path.insert(0, str(NULL_GPU))
    import build

    folder = tmp_path_factory.mktemp("null_gpus")
    variables = build.environment(folder) | {"DS_ACCELERATOR": "cuda", "NULL_GPU_COMPUTES": "1"}

    def run(entry: str, arguments: Sequence[str], env: Mapping[str, str], num_ranks: int, timeout: float) -> Ended:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "NULL_GPUS"), str(num_ranks))
        command = [sys.executable, str(NULL_GPU / "computed.py"), entry, *arguments]
        outputs = [(folder / name).open("a+") for name in ("stdout", "stderr")]
        ranks = [
            subprocess.Popen(
                command,
                env={**env, **variables, **meeting, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=outputs[0],
                stderr=outputs[1],
            )
            for rank in range(num_ranks)
        ]
        try:
            codes = [rank.wait(timeout) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        texts = []
        for output in outputs:
            output.seek(0)
            texts.append(output.read())
            output.close()
        return Ended(max(codes, key=abs), *texts)

    return run


@pytest.fixture(scope="module")
def pair(on_gpus: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    return launch_checks(CHECKS, 2, tmp_path_factory.mktemp("pair"), on_gpus)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, pair: dict[str, Verdict]) -> None:
    passed(pair[name])


def test_stages_on_two_gpus_equal_those_on_two_cpus(tiny: TinyRun, on_gpus: Run) -> None:
    for stage in (1, 2, 3):
        tiny.train_forked(stage, "cpus")
        options = (*PLAIN, "--set", "model.language_loss=plain", "--set", "data.num_workers=1")
        done = on_gpus("hive_ds.train:main", tiny.arguments(stage, "gpus", *options), tiny.environment(), 2, 600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stderr
        lines = [[line["loss"] for line in tiny.metrics(run, stage, "train")] for run in ("cpus", "gpus")]
        torch.testing.assert_close(*map(torch.tensor, lines), rtol=1e-5, atol=0)
        files = (Path(tiny.root, run, f"stage{stage}", "model", "model.safetensors") for run in ("cpus", "gpus"))
        torch.testing.assert_close(*map(load_file, files), rtol=0, atol=1e-6)
