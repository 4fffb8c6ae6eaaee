"""Profiled steps: they train as others do, and what is written tells their work apart.

The whole way, on ranks of ZeRO-3, is in `test_train_command.test_killed_and_resumed_equals_straight`.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from profiles import shares
from stage_helpers import make_model, step_batches
from torch.profiler import record_function

from hive_ds.stages import stage_by_number
from hive_ds.training.parts import shares_of
from hive_ds.training.profile import STEP, StepProfile, kinds_of_work

ALONE = SimpleNamespace(world=SimpleNamespace(rank=0, size=1))
STEPS = 4


def train(profile: StepProfile | None, stop: int = STEPS) -> tuple[list[int], Any]:
    """Steps with recomputed activations; which were done, and the model."""
    torch.manual_seed(3)
    model = make_model(stage_by_number(3))
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps, done = range(STEPS), []
    for step in steps if profile is None else profile.over(steps, model):
        for batch in step_batches(ALONE, step, 2):
            model(**batch.model_inputs("cpu", torch.float32), num_items_in_batch=1).loss.backward()
        with record_function("part:optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        done.append(step)
        if step + 1 == stop < STEPS:
            break
    return done, model


def test_profiled_steps_train_as_others_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "profile"
    done, model = train(StepProfile(folder, 2, 3, torch.device("cpu")))
    wanted, plain = train(None)
    assert done == wanted == [0, 1, 2, 3]
    weights = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    assert [len(one._forward_hooks) for one in model.modules()] == [len(one._forward_hooks) for one in plain.modules()]
    assert sorted(path.name for path in folder.iterdir()) == ["steps-000002-000003.json.gz", "steps-000002-000003.txt"]
    text = (folder / "steps-000002-000003.txt").read_text()
    assert capsys.readouterr().out.startswith(text[: text.index("└")])
    assert "aten::addmm" in text
    found = shares(text)
    assert sum(found["work"].values()) == pytest.approx(100, abs=0.5)
    assert sum(found["part"].values()) == pytest.approx(100, abs=0.5)
    assert [kind for kind, share in found["work"].items() if share == 0] == ["communication"]
    assert [part for part, share in found["part"].items() if share == 0] == ["data", "communication"]
    events = json.loads(gzip.decompress((folder / "steps-000002-000003.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "profiled step" for event in events) == 2


def test_a_profile_past_the_last_step_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = StepProfile(tmp_path / "profile", STEPS + 1, 9, torch.device("cpu")).over(range(STEPS), None)
    assert [*steps] == [*range(STEPS)]
    said = f"warning: training.profile is [5, 9], but the last step is {STEPS}: nothing is profiled\n"
    assert capsys.readouterr().out == said
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("first", "last", "stop", "names"),
    [
        (4, 9, STEPS, ["steps-000004-000004"]),  # as far as the run goes
        (5, 9, STEPS, []),
        (2, 3, 3, []),  # stopped within them
    ],
)
def test_only_steps_that_are_done(tmp_path: Path, first: int, last: int, stop: int, names: list[str]) -> None:
    done, _ = train(StepProfile(tmp_path, first, last, torch.device("cpu")), stop)
    assert done == list(range(stop))
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == [f"{name}.txt" for name in names]
    with pytest.raises(StopIteration):
        next(StepProfile(tmp_path, 1, 2, torch.device("cpu")).over(range(4, 4), None))


def test_a_profile_that_cannot_be_written_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("in the way")
    done, _ = train(StepProfile(tmp_path / "profile", 1, 1, torch.device("cpu")))
    assert done == [0, 1, 2, 3]
    assert "warning: step 1: no profile could be written" in capsys.readouterr().out


def test_kernels_of_a_gpu_count_whoever_starts_them() -> None:
    """Inductor's and Liger-Kernel's are started by no operator of PyTorch."""
    cpu, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name: str, kernels: float, device: Any = cpu, long: float = 0.0) -> SimpleNamespace:
        interval = SimpleNamespace(start=0.0, end=long, elapsed_us=lambda: long)
        return SimpleNamespace(
            name=name, device_type=device, time_range=interval, cpu_parent=None, self_device_time_total=kernels
        )

    events = [
        event(STEP, 0.0, long=100.0),
        event("aten::mm", 40.0),
        event("triton_poi_fused_mul_silu_3", 20.0),
        event("LigerFusedLinearCrossEntropyFunction", 10.0),
        event("triton_poi_fused_mul_silu_3", 20.0, gpu),  # the kernel itself
    ]
    found = kinds_of_work(events, cuda=True)
    assert {kind: share for kind, share in found.items() if share} == {
        "matrix products": 0.4,
        "elementwise, copies": 0.3,
        "Python, waiting": 0.3,
    }


def test_what_another_thread_recomputes_takes_no_gradient_of_others() -> None:
    """Threads number their nodes by themselves, and on a GPU backward runs in one of its own."""

    def event(
        name: str, number: int, around: Any = None, *, kernels: float = 0.0, thread: int = 1, at: float = 0.0
    ) -> Any:
        return SimpleNamespace(
            name=name,
            sequence_nr=number,
            cpu_parent=around,
            thread=thread,
            fwd_thread=1 if "Backward" in name else 0,
            time_range=SimpleNamespace(start=at),
            device_type=torch.autograd.DeviceType.CPU,
            self_device_time_total=kernels,
        )

    forward = event("aten::mm", 7, event("part:encoder", -1))
    backward = event("autograd::engine::evaluate_function: MmBackward0", 7, thread=2, kernels=3.0, at=2.0)
    again = event("aten::mm", 7, event("part:LLM", -1, thread=2), thread=2, kernels=1.0, at=1.0)
    found = shares_of([forward, again, backward], cuda=True)
    assert found["encoder"] == 0.75
    assert found["LLM"] == 0.25
