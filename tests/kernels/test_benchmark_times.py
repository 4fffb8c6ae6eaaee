"""The benchmark's figures: units, divisors, bytes by hand; a run that checked nothing is red; peers as the docs say."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

from benchmarks import peers, records, render, suite, test_attention, timing  # noqa: E402
from benchmarks.case import Case  # noqa: E402
from benchmarks.shapes import SHAPES, Work, tiny  # noqa: E402

CPU = torch.device("cpu")


def test_floors_of_decoding() -> None:
    """Of a-decode: a token in and out, all cached keys and values, the new tokens' rotation, no log-sum-exp."""
    q, keys, tables = 64 * 18 * 64 * 2, 2 * 64 * (128 + 576) * 6 * 64 * 2, 64 * 64 * 4
    work = SHAPES["a-decode"].work("forward", torch.bfloat16)
    assert work == Work(2 * q + keys + tables, 4 * 18 * 64 * 64 * (128 + 576))


def test_both_directions_are_one_and_the_other() -> None:
    shape = SHAPES["a"]
    forward, backward, both = (shape.work(name, torch.bfloat16) for name in ("forward", "backward", "both"))
    assert (both.bytes, both.flops) == (forward.bytes + backward.bytes, forward.flops + backward.flops)
    assert 2 * backward.flops == 5 * forward.flops


def test_rates_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy reads and writes; a product multiplies and adds."""
    monkeypatch.setattr(timing, "_median_seconds", lambda action, cuda: 0.5)
    assert timing.ceilings(CPU, torch.float32) == {"bytes_per_second": 2**27, "flops_per_second": 4 * 256**3}


def test_spread_is_half_the_distance_of_the_quartiles() -> None:
    assert timing.spread([1.0, 2.0, 3.0]) == 0.5


@pytest.mark.parametrize(("graphed", "calls"), [(True, 3), (False, 1)])
def test_a_reading_is_of_one_call(graphed: bool, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Event:
        """Of a GPU that takes 2 ms a call."""

        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            self.at = 2.0 * len(made)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Steps(list[int]):
        peer = SimpleNamespace(case=SimpleNamespace(device=CPU), graphed=graphed)

        def __call__(self, number: int) -> None:
            made.append(number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1)
    clock = timing.EventClock(Steps([0] * 3))  # type: ignore[arg-type]
    before = len(made)
    assert clock.sample() == pytest.approx(2e-3)
    assert len(made) - before == calls
    assert made == [number % 3 for number in range(len(made))]  # each call on another copy of the inputs


def test_an_eager_time_is_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_attention, "EAGER_CALLS", 10)
    monkeypatch.setattr(test_attention, "eager_calls", lambda peer, direction, calls: calls)
    row: dict[str, Any] = {"check": "passed", "seconds": 1.0}
    measurement = SimpleNamespace(row=lambda *_: row, peer=lambda name: name)
    bench: Any = SimpleNamespace(
        overdue=False, rows=[], measure_ceilings=lambda: None, measurement=lambda shape: measurement
    )
    stats = SimpleNamespace(stats=SimpleNamespace(median=5.0))
    benchmark: Any = SimpleNamespace(stats=stats, extra_info={}, pedantic=lambda *_, **__: None)
    test_attention.test_time(bench, benchmark, "a", "forward", "hive")
    assert bench.rows == [{"check": "passed", "seconds": 1.0, "eager_seconds": 0.5}]


def test_peak_memory_is_that_beyond_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "Steps", lambda *_, copies: lambda number: None)
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 100)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    peer: Any = SimpleNamespace(case=SimpleNamespace(device=torch.device("cuda")))
    assert timing.peak_bytes(peer, "forward") == 250


def test_a_line_of_the_table() -> None:
    """Microseconds, share of the floor, TFLOP/s, GB/s, multiple of ours, MiB."""
    common = {"shape": "s", "direction": "forward", "check": "passed", "note": "", "detail": "", "spread": 0.02}
    ours = {**common, "peer": "hive", "label": "ours", "seconds": 2e-3, "eager_seconds": 3e-3, "peak_bytes": 5 * 2**20}
    other = {**common, "peer": "sdpa", "label": "other", "seconds": 4e-3, "peak_bytes": None}
    record: dict[str, Any] = {"rows": [ours, other], "date": "2000-01-01", "tiny": False, "dirty": False}
    record |= {"device": {"name": "gpu"}, "torch": "", "triton": "", "commit": ""}
    record["ceilings"] = {"bytes_per_second": 4e12, "flops_per_second": 8e14}
    record["shapes"] = {"s": {"title": "t", "work": {"forward": {"bytes": 4 * 10**9, "flops": 4 * 10**11}}}}
    lines = render.table(record).splitlines()
    assert "Measured here: 4 TB/s copied, 800 TFLOP/s multiplied." in lines
    assert "| forward | floor | 1000 | | 100 | | | | | |" in lines
    assert "| forward | ours | 2000 ±2% | 3000 | 50 | 200 | 2e+03 | 1.00 | 5 |  |" in lines
    assert "| forward | other | 4000 ±2% |  | 25 | 100 | 1e+03 | 2.00 |  |  |" in lines


@pytest.mark.parametrize(("skipped", "verdict"), [(3, "failed"), (2, "passed")])
def test_skipping_every_test_on_a_gpu_is_red(
    skipped: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    xml = tmp_path / "gpu.xml"
    xml.write_text(f'<testsuites><testsuite tests="3" failures="0" errors="0" skipped="{skipped}"/></testsuites>')
    step = suite.Step("gpu tests", [f"--junitxml={xml}"], 1, verdict="passed")
    suite._count_tests(step)
    assert step.verdict == verdict
    assert step.tests == {"tests": 3, "failures": 0, "errors": 0, "skipped": skipped}


def test_the_sanitizer_fails_on_what_it_finds() -> None:
    steps = {step.name: step for step in suite.checks(Path("xml"))}
    for tool in ("memcheck", "racecheck"):
        assert steps[tool].command[1:5] == ["--tool", tool, "--error-exitcode", str(suite.SANITIZER_FAILURE)]
        assert steps[tool].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_peers_have_what_the_docs_say_was_done_for_them() -> None:
    for name, shape in SHAPES.items():
        case = Case(tiny(shape), CPU, torch.float32)
        assert [stride % 16 for stride in peers.DenseMask(case).mask.stride()[:3]] == [0, 0, 0]
        flex = peers.Flex(case)
        assert flex._block_mask.shape[0] == (case.layout.num_samples if name == "a-two-images" else 1)


def test_the_commit_of_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIVE_COMMIT", raising=False)
    changed = [""]
    monkeypatch.setattr(records, "_output", lambda command: "c0ffee" if "rev-parse" in command else changed[0])
    assert records.commit() == {"commit": "c0ffee", "dirty": False}
    changed[0] = " M a.py"
    assert records.commit() == {"commit": "c0ffee", "dirty": True}
    monkeypatch.setenv("HIVE_COMMIT", "d00d")
    assert records.commit() == {"commit": "d00d", "dirty": None}


def test_a_second_sigterm_does_not_stop_the_writing() -> None:
    """As `timeout make gpu-suite` sends it, to make, which sends it on, and to all of its group."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            suite._stop()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
