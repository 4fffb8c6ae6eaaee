"""The benchmark of the training step: the very command of a machine with a GPU, on tiny models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import run_forked
from matplotlib.axes import Axes

from hive_ds.benchmarks import padded_ways, report
from hive_ds.benchmarks.agreement import Outcome, compared
from hive_ds.benchmarks.arms import LABELS, Setting, build_arm
from hive_ds.benchmarks.side_by_side import GRACE, time_side_by_side
from hive_ds.benchmarks.sizes import TINY, caption_lengths, make_batch
from hive_ds.benchmarks.step import PROBES, Run, main
from hive_ds.benchmarks.trainer import engine_refusal
from hive_ds.errors import HiveError
from hive_ds.training.parts import slowest_kernels

MINIMAL_ROW: dict[str, Any] = {
    **{"arm": "ours", "workload": "captions x 2", "check": "passed", "micro_batch": 2, "seconds": 1.0, "flops": 1.0},
    **{"images_per_second": 2.0, "text_tokens_per_second": 1.0, "mfu": 0.4, "peak_bytes": 1, "shares": {}},
}
ROOT = Path(__file__).resolve().parents[2]


def run_alone(entry: str, *arguments: str) -> str:
    """What ``entry`` prints in a process of its own: DeepSpeed starts once in each."""
    done = run_forked(entry, arguments, {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, 1, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_suite_times_every_way_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = ["make", "-s", "-C", str(ROOT), "gpu-suite", "PART=stage3", f"SUITE_PYTHON={sys.executable}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-cpu-*-stage3.json")
    record = json.loads(path.read_text())
    assert record["command"] == "make gpu-suite PART=stage3"
    assert {"device", "torch", "triton", "commit", "dirty"} <= record.keys()
    check_result(record)
    report.picture(record, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stage", ["1", "2"])
def test_the_other_stages(stage: str, tmp_path: Path) -> None:
    run_alone("hive_ds.benchmarks.step:main", stage, "--out", str(tmp_path / "out.json"))
    check_result(json.loads((tmp_path / "out.json").read_text()))


@pytest.mark.parametrize("way", ["ours", "ours zero3"])
def test_a_step_that_runs_out_of_memory_leaves_nothing_behind(way: str) -> None:
    """Neither gradients that the next step would add to, nor weights in DeepSpeed's buckets, which take none twice."""
    before, after = json.loads(run_alone("oom_main:main", way).splitlines()[-1])
    assert after == pytest.approx(before, rel=1e-3, abs=1e-3)


def test_side_by_side(tmp_path: Path) -> None:
    """What the ways say in processes of their own is put together."""
    setting = Setting(TINY, 2, torch.device("cpu"), compiled=False)
    run = Run(setting, 0.0, time.perf_counter() + 240, tmp_path / "all.json")
    run.result = {"rows": [], "skipped": []}
    time_side_by_side(run, ["ours", "paper"], ["2", "--loads", "captions x 2", "--parts", "1"])
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["skipped"] == []
    assert [(row["arm"], row["workload"], row["check"]) for row in found["rows"]] == [
        ("ours", "captions x 2", "passed"),
        ("paper", "captions x 2", "passed"),
    ]
    assert all(sum(row["shares"].values()) == pytest.approx(1, abs=1e-2) for row in found["rows"])
    rates = [row["flops"] / row["seconds"] / row["mfu"] for row in found["rows"]]
    assert rates == pytest.approx([found["matmul_flops_per_second"]] * 2)


def test_a_way_that_ends_without_a_row_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named, even where its exit status is that of a way whose row says what failed."""
    run = Run(Setting(TINY, 2, torch.device("cpu"), compiled=False), 0.0, time.perf_counter() + 60, tmp_path / "a.json")
    run.result = {"rows": [], "skipped": []}
    monkeypatch.setattr(sys, "executable", "/bin/false")
    time_side_by_side(run, ["ours", "paper"], ["2"])
    assert [(row["arm"], row["check"]) for row in run.result["rows"]] == [
        ("ours", "its process ended with 1"),
        ("paper", "its process ended with 1"),
    ]


def test_processes_know_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long their imports take: a killed one would not say where its rows' time goes."""
    commands: list[list[str]] = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command) or start(["true"]))
    run = Run(Setting(TINY, 2, torch.device("cpu"), compiled=False), 0.0, time.perf_counter() + 60, None)
    run.result = {"rows": [], "skipped": []}
    time_side_by_side(run, ["ours"], ["2"])
    told = dict(zip(commands[0][4::2], commands[0][5::2], strict=True))
    assert float(told["--until"]) == run.deadline - GRACE
    assert float(told["--seconds"]) == pytest.approx(60 - GRACE, abs=5)
    assert main(["1", "--until", str(time.perf_counter() - 1), "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["rows"], {one["why"] for one in found["skipped"]}) == ([], {"no time left for it"})


def test_unknown_names_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for option, known in (("--arms", "ours, ours compiled"), ("--loads", "captions x 2, 32 tokens x 2")):
        with pytest.raises(SystemExit):
            main(["1", option, "no such"])
        assert f"{option} names 'no such'; expected some of {known}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "text", "[]", '{"kind": "checks"}'])
def test_what_is_no_result_is_named(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    with pytest.raises(HiveError, match=rf"^{re.escape(str(path))}: .*expected a result file of "):
        report.main()


def test_every_row_is_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In milliseconds by part; as a whole where the parts are not known, as of a way that time was up for."""
    bars: dict[tuple[str, str], float] = {}

    def barh(panel: Axes, names: list[str], widths: list[float], **named: Any) -> None:
        bars.update({(name, named["label"]): width for name, width in zip(names, widths, strict=True) if width})

    monkeypatch.setattr(Axes, "barh", barh)
    record = {"stage": 1, "models": "", "tiny": True}
    rows = [{**MINIMAL_ROW, "shares": {"LLM": 0.7, "data": 0.3}}, {**MINIMAL_ROW, "arm": "sa", "seconds": 2.0}]
    report.picture(record | {"rows": rows}, tmp_path / "bars.png")
    assert bars == {("ours", "LLM"): 700, ("ours", "data"): 300, ("sa", "not told apart"): 2000}
    with pytest.raises(HiveError, match="nothing was timed"):
        report.picture(record | {"rows": [{"arm": "sa", "check": "loss is 3"}]}, tmp_path / "bars.png")


def test_slowest_kernels() -> None:
    def event(name: str, microseconds: float, kind: Any, **more: Any) -> Any:
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(elapsed_us=lambda: microseconds), device_type=kind, **more
        )

    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event("a", 5.0, gpu), event("b", 9.0, gpu), event("a", 7.0, gpu), event("a", 70.0, cpu)]
    events.append(event("part:LLM", 90.0, gpu, is_user_annotation=True))
    assert slowest_kernels(events, count=1) == {"all": 0.021, "most": [("a", 0.012, 2)]}


def check_result(record: dict[str, Any]) -> None:
    """Every way was checked and timed on everything."""
    assert record["tiny"]
    assert record["skipped"] == []
    assert {row["check"] for row in record["rows"]} == {"passed"}
    timed = {(row["arm"], row["workload"]) for row in record["rows"] if row["seconds"] > 0}
    ways = {"paper", "sa", "ours zero3", "ours", "sa packed"}
    assert timed == {(arm, load) for arm in ways for load in ("captions x 2", "32 tokens x 2")}
    for row in record["rows"]:
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-2)
        assert min(row["shares"][part] for part in ("encoder", "projectors", "LLM", "optimizer")) > 0
        assert row["images_per_second"] * row["seconds"] == pytest.approx(2)
        if row["workload"] == "32 tokens x 2":
            assert row["text_tokens_per_second"] * row["seconds"] == pytest.approx(64)
        assert row["mfu"] * row["seconds"] * record["matmul_flops_per_second"] == pytest.approx(row["flops"])
    text = report.table(record)
    assert all(LABELS[arm] in text for arm in ways)
    assert "counted FLOPs allow" in text


def test_a_way_that_computes_something_else_is_red() -> None:
    wanted = Outcome(2.0, [torch.tensor([3.0, 0.0]), torch.tensor([4.0])])
    assert compared(wanted, wanted, torch.float32) == "passed"
    loss = Outcome(2.001, wanted.gradients)
    assert compared(loss, wanted, torch.float32) == "loss is 2.001, but that of our plain step is 2"
    turned = Outcome(2.0, [torch.tensor([0.0, 3.0]), torch.tensor([4.0])])  # as long as before
    assert compared(turned, wanted, torch.bfloat16).startswith("gradients are 0.849 of their length away")
    lost = Outcome(2.0, [torch.tensor([3.0, float("nan")]), torch.tensor([4.0])])
    assert compared(lost, wanted, torch.bfloat16).startswith("gradients are nan")
    row = {"arm": "sa", "label": "SA", "workload": "w", "check": "loss is 3"}
    record = {"stage": 1, "models": "", "precision": "", "matmul_flops_per_second": 1.0, "tiny": True, "skipped": []}
    assert "check failed: loss is 3" in report.table(record | {"rows": [row]})


class BFloat16(Setting):
    """As on a GPU."""

    dtype = torch.bfloat16  # type: ignore[assignment]


@pytest.mark.parametrize("stage", [1, 3])
def test_wrong_attention_is_red_in_bf16(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though loss and norm of the gradients hardly change: the paper's way that sees all, SA that is not causal."""
    setting = BFloat16(TINY, stage, torch.device("cpu"), compiled=False)
    probes = [make_batch(TINY, caption_lengths(TINY, count, seed=9), 9) for count in PROBES]
    assert [build_arm(way, setting, probes).check for way in ("paper", "sa")] == ["passed", "passed"]
    additive, attend = padded_ways._additive, padded_ways.scaled_dot_product_attention
    monkeypatch.setattr(padded_ways, "_additive", lambda seen, dtype: additive(torch.ones_like(seen), dtype))
    assert "gradients are" in build_arm("paper", setting, probes).check
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", uncausal(attend))
    assert "gradients are" in build_arm("sa", setting, probes).check


def uncausal(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *inputs, **named: attend(*inputs, **{**named, "is_causal": False})


def test_a_row_whose_rounds_differ_is_marked() -> None:
    rows = [{**MINIMAL_ROW, "label": "one", "spread": 0.11}, {**MINIMAL_ROW, "label": "other", "spread": 0.09}]
    record = {"stage": 1, "models": "", "precision": "", "matmul_flops_per_second": 1.0, "tiny": True, "skipped": []}
    assert "Not steady, rounds differ by more than 10%: one.\n" in report.table(record | {"rows": rows})


def test_a_row_beside_ours() -> None:
    """Half of the rounds' spread; GiB; seconds and counted FLOPs as multiples of ours and of SA's."""
    ours = {**MINIMAL_ROW, "label": "ours", "spread": 0.04, "seconds": 0.5, "peak_bytes": 3 * 2**30, "flops": 2.0}
    ours |= {"shares": {"LLM": 0.75, "data": 0.004}}
    sa = {**MINIMAL_ROW, "arm": "sa", "label": "SA", "spread": 0.0, "seconds": 1.5, "peak_bytes": None, "flops": 8.0}
    record = {"stage": 1, "models": "", "precision": "", "matmul_flops_per_second": 2e12, "tiny": True, "skipped": []}
    lines = report.table(record | {"rows": [ours, sa]}).splitlines()
    assert "measured here: 2 TFLOP/s of a large matrix product." in lines[0]
    assert "| ours | 500 ±2% | 2 | 1 | 40 | 3 | 1.00 | LLM 75% |" in lines
    assert "| SA | 1500 ±0% | 2 | 1 | 40 |  | 3.00 |  |" in lines
    assert "Over SA: 3.00 times as fast; counted FLOPs allow 4.00 (0.75 of that)." in lines


def test_an_engine_that_does_not_load_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built and compiled for it."""
    assert engine_refusal() is None
    monkeypatch.delitem(sys.modules, "hive_ds.training.loop")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert "tqdm" in str(engine_refusal())


def test_every_way_is_judged_at_its_best_batch() -> None:
    def row(arm: str, texts: str, count: int, images: float, flops: float) -> dict[str, Any]:
        return {
            **MINIMAL_ROW,
            **{"arm": arm, "label": LABELS[arm], "workload": f"{texts} x {count}", "spread": 0.0},
            **{"micro_batch": count, "seconds": count / images, "images_per_second": images, "flops": flops * count},
        }

    rows = [
        row("ours", "captions", 32, 100.0, 2.0),
        row("ours", "captions", 96, 240.0, 2.0),
        row("sa", "captions", 32, 80.0, 4.0),
        row("sa", "captions", 96, 75.0, 4.0),
        {"arm": "paper", "label": "", "workload": "all that is left", "check": "its process ended with 1"},
        row("ours", "32 tokens", 64, 50.0, 1.0),
    ]
    record = {"stage": 1, "models": "", "precision": "", "matmul_flops_per_second": 1.0, "tiny": True, "skipped": []}
    lines = report.table(record | {"rows": rows}).partition("### At the best batch of each")[2].splitlines()
    assert [line for line in lines if line.startswith("| captions")] == [
        "| captions | ours, packed | 96 | 240 | 1.00 | 1.00 | 1.00 |",
        "| captions | SA: patches in the sequence, padded, causal SDPA, torch.compile | 32 | 80 | 3.00 | 2.00 | 1.50 |",
    ]
    assert not any("32 tokens" in line for line in lines)


def test_a_timed_step_needs_no_streaming() -> None:
    """Machines that only time a step have no data, and streaming holds transformers below 5."""
    code = "import sys; sys.modules['streaming'] = None; import hive_ds.benchmarks.step, hive_ds.training.loop"
    subprocess.run([sys.executable, "-c", code], check=True)
