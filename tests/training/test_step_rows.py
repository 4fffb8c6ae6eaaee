"""What the step benchmark makes of a step: units, divisors, and what stays when memory, time or a way gives out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hive_ds.benchmarks import arms, gpu, padded_ways, step
from hive_ds.benchmarks.arms import LABELS, Arm, Setting, build_arm
from hive_ds.benchmarks.side_by_side import time_side_by_side
from hive_ds.benchmarks.sizes import TINY, build_cascaded, build_hive, caption_lengths, make_batch, real_captions
from hive_ds.benchmarks.step import ROUNDS, Run, Workload, measure, time_here, workloads
from hive_ds.data.batch import PackedBatch
from hive_ds.model.flash import TORCH_FLASH
from hive_ds.model.language import decoder
from hive_ds.training.flops import BatchSize

CPU = torch.device("cpu")
RATE = 4.0


class Stepper:
    """No training."""

    def step(self, batch: PackedBatch) -> float:
        return 0.0

    def forget(self) -> None:
        """Nothing is left behind."""


def arm_of(name: str, stepper: Stepper, counter: Any = None) -> Arm:
    counter = counter or SimpleNamespace(count=lambda work: 1.0)
    return Arm(name, LABELS[name], torch.nn.Linear(1, 1), lambda: stepper, counter, "passed")


def run_of(out: Path | None, seconds: float = 600.0, device: str = "cpu") -> Run:
    setting = Setting(TINY, 2, torch.device(device), compiled=False)
    result: dict[str, Any] = {"rows": [], "skipped": [], "ready": False}
    return Run(setting, RATE, time.perf_counter() + seconds, out, result)


def measured(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> tuple[dict[str, Any], list[BatchSize], int]:
    """A row of two batches as on a GPU, of steps that take so long in turn; the work counted; the steps made."""
    now, left = [0.0], list(seconds)

    class Timed(Stepper):
        def step(self, batch: PackedBatch) -> float:
            now[0] += left.pop(0)
            return 0.0

    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(step, "wait", lambda device: None)
    monkeypatch.setattr(step, "held_by_others", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    works: list[BatchSize] = []
    counter = SimpleNamespace(count=lambda work: works.append(work) or 100.0 * work.text_tokens)
    load = Workload("captions", [make_batch(TINY, [3, 5], 0), make_batch(TINY, [4, 8], 1)])
    run = Run(Setting(TINY, 2, torch.device("cuda"), compiled=False), RATE, 0.0, None)
    row, _ = measure(run, arm_of("ours", Timed(), counter), load, with_trace=False)
    return row, works, len(seconds) - len(left)


def test_a_row_is_of_one_step_of_the_mean_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of the median round, batches that compile not counted."""
    row, works, steps = measured(monkeypatch, [100.0, 100.0, 1.0, 3.0, 2.0, 4.0, 5.0, 5.0, 7.0])
    assert works == [BatchSize.of(lengths, [[0], [0]], sum(lengths) - 2, [16, 16]) for lengths in ([3, 5], [4, 8])]
    assert steps == 2 + 2 * ROUNDS + 1
    assert {name: value for name, value in row.items() if name not in ("arm", "label", "workload", "check")} == {
        **{"micro_batch": 2, "seconds": 3.0, "spread": 1.0, "host_seconds": 7.0, "images_per_second": 2 / 3},
        **{"text_tokens_per_second": 10 / 3, "flops": 1000.0, "mfu": 1000 / 3 / RATE, "peak_bytes": 12345},
        **{"others_bytes": 7, "shares": {}},
    }


def test_short_steps_are_timed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    row, _, steps = measured(monkeypatch, [1.0, 1.0, *[0.125] * 40])
    assert row["seconds"] == 0.125
    assert steps == 2 + step.SECONDS / 0.125 + 1


def test_larger_batches_of_texts_that_did_not_fit_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(Stepper):
        def step(self, batch: PackedBatch) -> float:
            if batch.num_images == 4:
                raise torch.OutOfMemoryError
            return 0.0

    @contextmanager
    def traced(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(events=list)

    monkeypatch.setattr(step, "build_arm", lambda name, *_: arm_of(name, Small()))
    monkeypatch.setattr(step, "traced", traced)
    monkeypatch.setattr(step, "shares_of", lambda events, cuda: {"LLM": 1.0})
    run = run_of(tmp_path / "out.json")
    names = ["captions x 2", "32 tokens x 2", "captions x 4", "captions x 8"]
    step.time_arm(run, "ours", workloads(TINY, names), parts=1)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["workload"], row["shares"]) for row in found["rows"]] == [(names[0], {"LLM": 1.0}), (names[1], {})]
    assert [(one["what"], one["why"]) for one in found["skipped"]] == [
        (f"ours, packed, {names[2]}", "out of memory; others held 0.0 GiB"),
        (f"ours, packed, {names[3]}", "out of memory at fewer samples"),
    ]


def test_a_way_that_fails_keeps_its_rows_and_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(Stepper):
        def step(self, batch: PackedBatch) -> float:
            if batch.text_lengths == [32, 32]:
                raise NotImplementedError
            return 0.0

    steppers = {"paper": Fails(), "ours": Stepper()}
    monkeypatch.setattr(step, "build_arm", lambda name, *_: arm_of(name, steppers[name]))
    monkeypatch.setattr(step, "traced", lambda *_: nullcontext(SimpleNamespace(events=list)))
    monkeypatch.setattr(step, "shares_of", lambda events, cuda: {"LLM": 1.0})
    run = run_of(tmp_path / "out.json")
    time_here(run, ["paper", "ours"], SimpleNamespace(loads="", parts=9))  # type: ignore[arg-type]
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["arm"], row["workload"], row["check"], row.get("shares")) for row in found["rows"]] == [
        ("paper", "captions x 2", "passed", {"LLM": 1.0}),
        ("paper", "all that is left", "NotImplementedError: ", None),
        ("ours", "captions x 2", "passed", {"LLM": 1.0}),
        ("ours", "32 tokens x 2", "passed", {"LLM": 1.0}),
    ]


def test_what_processes_leave_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is late, one says itself what is wrong, one ends without a word; the best rate is that of all."""
    timed = {"check": "passed", "flops": 6.0, "seconds": 1.5, "mfu": 9.9}
    told = {
        "ours": [{**timed, "arm": "ours"}],
        "paper": [{"arm": "paper", "check": "loss is 3"}],
        "sa": [{**timed, "arm": "sa"}],
    }
    for rate, (name, rows) in enumerate(told.items(), start=1):
        result = {"rows": rows, "skipped": [], "ready": True, "matmul_flops_per_second": float(rate)}
        (tmp_path / f"python.{name}").write_text(json.dumps(result))
    python = tmp_path / "python"
    ends = "case $way in ours) exec sleep 60;; paper) exit 1;; *) exit 7;; esac"
    options = (
        'while [ $# -gt 1 ]; do case $1 in --arms) way=$2;; --out) out=$2;; esac; shift; done; cp "$0.$way" "$out"'
    )
    python.write_text(f"#!/bin/sh\n{options}\n{ends}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    run = run_of(tmp_path / "all.json", seconds=4.0)
    run.rate = 0.0
    time_side_by_side(run, list(told), ["2"])
    found = json.loads((tmp_path / "all.json").read_text())
    assert [(row["arm"], row["check"], row.get("mfu")) for row in found["rows"]] == [
        ("ours", "passed", 6.0 / 1.5 / 3),
        ("paper", "loss is 3", None),
        ("sa", "passed", 6.0 / 1.5 / 3),
        ("sa", "its process ended with 7", None),
    ]
    assert found["skipped"] == [{"what": "ours, packed, what is left of it", "why": "no time left for it"}]


def test_a_plain_step_clips_and_writes_its_weights() -> None:
    probe = make_batch(TINY, [5, 9], 9)
    arm = build_arm("ours", Setting(TINY, 3, CPU, compiled=False), [probe])
    stepper: Any = arm.stepper
    loss, before = stepper.loss, [weight.clone() for weight in stepper.weights]
    stepper.loss = lambda *inputs: 1e4 * loss(*inputs)
    stepper.step(probe)
    assert torch.nn.utils.get_total_norm([master.grad for master in stepper.masters]) == pytest.approx(1, abs=1e-3)
    assert all(torch.equal(*pair) for pair in zip(stepper.weights, stepper.masters, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(stepper.weights, before, strict=True))


def test_what_others_hold_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 140))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    assert gpu.held_by_others(torch.device("cuda")) == 30


def test_batches_of_captions() -> None:
    """A token to begin with and real lengths; all but the first of each text carry loss."""
    real = replace(TINY, caption_scale=1.0)
    assert {length - 1 for length in caption_lengths(real, 2000, 0)} == set(real_captions())
    batch = make_batch(TINY, [3, 2], 0)
    assert (batch.labels == torch.tensor([-100, *batch.input_ids[1:3], -100, batch.input_ids[4]])).all()


def test_ways_are_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)  # given back
    monkeypatch.setattr(arms, "compile_blocks", lambda model, *_: compiled.append(model))
    monkeypatch.setattr(arms.PaperWay, "compile", lambda way: compiled.append(way.hive))
    monkeypatch.setattr(arms.PaddedCascade, "compile", lambda way: compiled.append(way.model))
    setting = Setting(TINY, 3, CPU, compiled=True)
    for name in LABELS.keys() - {"ours zero3"}:
        sa = name.startswith("sa")
        hive = partial(build_hive, TINY, setting.described("hive"))
        model: Any = (partial(build_cascaded, TINY) if sa else hive)(CPU, torch.float32)
        compiled.clear()
        arms._loss_of(name, model, setting)
        assert compiled == ([model] if "torch.compile" in LABELS[name] else []), name
        if not sa:
            backends = [layer.self_attn.backend for layer in decoder(model.language_model).layers]
            assert backends == (["auto", TORCH_FLASH, "auto"] if name == "ours flash" else ["auto"] * 3)


def test_the_peers_are_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders: list[Any] = []
    monkeypatch.setattr(padded_ways, "compile_encoder", lambda encoder, backend: encoders.append(encoder))
    hive = build_hive(TINY, Setting(TINY, 3, CPU, compiled=True).described("hive"), CPU, torch.float32)
    cascaded = build_cascaded(TINY, CPU, torch.float32)
    paper = padded_ways.PaperWay(hive)
    paper.compile("eager")
    padded_ways.PaddedCascade(cascaded).compile("eager")
    assert encoders == [hive.vision_encoder, cascaded.vision_encoder]
    assert paper.layer is not padded_ways._layer
    own = [*hive.projectors.values(), cascaded.projector, *decoder(cascaded.language_model).layers]
    assert all("forward" in vars(module) for module in own)
    mask = padded_ways._additive(torch.ones(2, 3, 21, dtype=torch.bool), torch.float32)
    assert (mask.shape, [stride % 16 for stride in mask.stride()[:3]]) == ((2, 1, 3, 21), [0, 0, 0])
