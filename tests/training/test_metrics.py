"""``metrics.jsonl``: what a line says, and on full disks and after kills that none is lost or glued to another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_disk import full_disk

from hive_ds.events import read_events
from hive_ds.training import loop, metrics
from hive_ds.training.distributed import World
from hive_ds.training.metrics import Meter, MetricsLog, Totals


def test_a_full_disk_costs_lines_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, World(), 0)
    log.write("start", 0)
    for step in (1, 4):
        with full_disk(path.stat().st_size + 10):
            log.write("train", step)
            log.write("train", step + 1)
        log.write("train", step + 2)
    assert [event["step"] for event in read_events(path)] == [0, 3, 6]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in said] == [["warning", "step 1"], ["warning", "step 4"]]
    assert f"{path} cannot be written ([Errno 27] File too large); its lines are lost" in said[0]
    assert [event["step"] for event in dropped(path, 3)] == [0, 3]


def dropped(path: Path, first_step: int) -> list[dict[str, object]]:
    """Every line that a run which resumes from ``first_step`` leaves."""
    MetricsLog(path, World(), first_step)
    return [json.loads(line) for line in path.read_text().splitlines()]


def earlier_attempt(path: Path, steps: int, end: str) -> str:
    path.write_text("".join(f'{{"event": "train", "step": {step}}}\n' for step in range(steps)) + end)
    return path.read_text()


@pytest.mark.parametrize(
    ("first_step", "end", "left"),
    [
        (0, "", []),
        (2, "", [0, 1, 2]),
        (9, '{"event": "tr', [0, 1, 2, 3]),
        (9, '{"event": "train", "step": 4}', [0, 1, 2, 3, 4]),
    ],
)
def test_a_resume_drops_later_lines_and_a_half_one(first_step: int, end: str, left: list[int], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    earlier_attempt(path, 4, end)
    assert [event["step"] for event in dropped(path, first_step)] == left
    MetricsLog(path, World(), 9).write("train", 10)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*left, 10]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[1]\n3\n", b'{"event": "train", "step": "x"}\n', b"\0" * 99])
def test_a_damaged_line_costs_itself_alone(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(earlier_attempt(path, 2, "").encode() + damage)
    if b"step" not in damage:
        assert [event["step"] for event in read_events(path)] == [0, 1]
    assert [event["step"] for event in dropped(path, 9)] == [0, 1]


def test_a_full_disk_at_a_resume_costs_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = earlier_attempt(path, 20, "")
    with full_disk(100):
        MetricsLog(path, World(), 19)  # nothing to drop, nothing to write
        with pytest.raises(OSError, match=r"metrics\.jsonl: lines of an earlier attempt .*File too large.*unchanged"):
            MetricsLog(path, World(), 10)
    assert path.read_text() == before


def test_rates_leave_out_pauses_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation between two lines: the steps before it count, in tokens and in time."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    meter = Meter(2, 1e12, torch.device("cpu"))
    meter.restart()
    for step in range(10):
        now[0] += 1.0
        meter.add(Totals(tokens=200.0, wait=0.4), loss=1.0)
        if step == 4:
            meter.pause()
            now[0] += 50.0
            meter.restart()
    values = meter.read(steps_left=3)
    assert values["tokens_per_second_per_gpu"] == pytest.approx(100)
    assert values["data_wait_share"] == pytest.approx(0.2)
    assert (values["seconds_per_step"], values["eta_seconds"]) == (pytest.approx(1), pytest.approx(3))


def test_numbers_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, two steps of two seconds, the second of which has thrice the text; and a line that starts over."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    meter = Meter(2, 1e12, torch.device("cpu"), samples=100.0, cut_samples=5.0, bad_samples=6.0)
    meter.restart()
    for times, loss in ((1, 5.0), (3, 1.0)):
        now[0] += 2.0
        step = Totals(supervised=10, tokens=40, images=6, samples=8, cut=1, bad=2, flops=5e11, wait=0.2)
        meter.add(Totals(*(times * value for value in step.vector())), loss)
    values = meter.read(steps_left=10)
    assert 0.05 < values.pop("memory_gb") < 1000
    assert values == pytest.approx(
        {
            "loss": 2.0,  # (1 * 5 + 3 * 1) / 4
            "tokens_per_second_per_gpu": 4 * 40 / 4 / 2,
            "images_per_second_per_gpu": 4 * 6 / 4 / 2,
            "mfu": 4 * 5e11 / 4 / 2 / 1e12,
            "data_wait_share": 4 * 0.2 / 4 / 2,
            "supervised_share": 0.25,
            "samples": 100 + 4 * 8,
            "cut_samples": 5 + 4 * 1,
            "bad_samples": 6 + 4 * 2,
            "seconds_per_step": 2.0,
            "eta_seconds": 20.0,
        }
    )
    now[0] += 3.0
    meter.add(Totals(tokens=60, samples=8), math.nan)
    values = meter.read(steps_left=9)
    assert math.isnan(values["loss"])
    found = [values[name] for name in ("tokens_per_second_per_gpu", "seconds_per_step", "mfu", "samples")]
    assert found == pytest.approx([10, 3, 0, 140])


def test_what_is_between_steps_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations, maps and saves take no time of the steps around them, and those keep theirs."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "norms_over_ranks", lambda squares, engine: {})

    def long(*_: Any) -> dict[str, float]:
        now[0] += 50.0
        return {"share": 0.5}

    none = SimpleNamespace(**dict.fromkeys(("write", "write_events", "gather_parts", "wait"), lambda *_, **__: None))
    engine, meter = SimpleNamespace(**vars(none), model=None), Meter(1, 1e12, torch.device("cpu"))
    job: Any = SimpleNamespace(
        meter=meter,
        metrics=none,
        engine=engine,
        world=World(),
        validation={},
        questions=SimpleNamespace(ask=long),
        checkpoints=SimpleNamespace(wait=none.wait, begin=long),
        maps=SimpleNamespace(sample=SimpleNamespace(id="a"), draw=long),
    )
    meter.restart()
    for between in (
        lambda: loop._validate(job, 1),
        lambda: loop._map(job, 1, {}),
        lambda: loop._save(job, 1, {}, last=False),
    ):
        for _ in range(2):
            now[0] += 1.0
            meter.add(Totals(), 1.0)
            between()
        assert meter.read(0)["seconds_per_step"] == pytest.approx(1.0)
