"""Curves, tables and warnings of a run hold what was logged, under the right names and in the right unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_folders import start, train, validation, write_results, write_stage

from hive_ds.plots import COLOURS, Line
from hive_ds.recipe import dump_recipe, load_recipe
from hive_ds.report import curves
from hive_ds.report.attempts import warnings
from hive_ds.report.page import render_report
from hive_ds.report.results import MOST_PICTURES, answer_rows, benchmark_rows, pictures
from hive_ds.report.run import RunRecord, read_runs
from hive_ds.report.tables import cost_rows, difference_rows, validation_rows, version_rows


def answers(step: int, share: float) -> dict[str, Any]:
    return {"event": "answers", "step": step, "share": share}


def read(folder: Path) -> RunRecord:
    (run,) = read_runs([folder])
    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Line]]:
    """The lines of every plot, by its title, as soon as it is drawn."""
    found: dict[str, list[Line]] = {}

    def record(lines: list[Line], x_label: str, y_label: str, **options: bool) -> str:
        found[y_label] = lines
        return ""

    monkeypatch.setattr(curves, "line_plot", record)
    return found


def named(lines: list[Line]) -> dict[str, list[tuple[float, float]]]:
    return {line.name: list(line.points) for line in lines}


def test_curves_of_a_run(tmp_path: Path, drawn: dict[str, list[Line]]) -> None:
    """The training loss is a running mean over a fiftieth of its points: 2 of 100."""
    rates = {"a": 1e-3, "b": 1e-3, "c": 1e-3, "d": 2e-3}
    norms = {f"group {number}": float(number) for number in range(7)}
    lines = [train(step, 100, lr=rates, grad_norms=norms) for step in range(1, 101)]
    events = [start(0), *lines, validation(50, 3.5), answers(50, 0.25), validation(100, 2.5)]
    write_stage(tmp_path / "run", 1, events)
    page = curves.stage_curves([read(tmp_path / "run")], 1)
    losses = named(drawn["loss, nats per token"])
    assert losses["held out"] == [(50, 3.5), (100, 2.5)]
    assert losses["text alone"] == [(50, 7.0), (100, 5.0)]
    smooth = dict(losses["training"])
    assert smooth[1] == lines[0]["loss"]
    assert smooth[100] == pytest.approx((lines[98]["loss"] + lines[99]["loss"]) / 2)
    assert list(named(drawn["learning rate"])) == ["a and 2 more", "d"]
    assert page.count("lines not drawn: 1") == 1
    assert len(drawn["gradient norm before clipping"]) == 6
    for title, value in (
        ("questions answered, %", 25.0),
        ("MFU, % of the measured matrix rate", 40.0),
        ("waiting for data, % of the time", 1.0),
        ("text tokens per second and device", 1000.0),
        ("images per second and device", 10.0),
    ):
        (line,) = drawn[title]
        assert line.points[0][1] == pytest.approx(value), title


def test_curves_of_several_runs(tmp_path: Path, drawn: dict[str, list[Line]]) -> None:
    """Each has one colour in all stages; of the groups' rates the highest counts."""
    groups = {"projectors": 2e-3, "vision_encoder": 1e-3}
    events = [start(0), *(train(step, 4, lr=groups, grad_norm=float(step)) for step in (1, 2))]
    write_stage(tmp_path / "short", 1, events)
    for number in (1, 2):
        write_stage(tmp_path / "long", number, events)
    curves.stage_curves(read_runs([tmp_path / "short", tmp_path / "long"]), 2)
    for title, points in (
        ("learning rate, highest of the groups", [(1, 2e-3), (2, 2e-3)]),
        ("gradient norm before clipping", [(1, 1.0), (2, 2.0)]),
    ):
        (line,) = drawn[title]
        assert (line.name, line.colour, list(line.points)) == ("long", COLOURS[1], points)


def test_tables_of_two_stages(tmp_path: Path) -> None:
    """Sums of both; first, best and last; recipe and versions of the later one, a stage's own values of its own."""
    questions = [answers(1, 0.1), answers(2, 0.5), answers(3, 0.3)]
    first = write_stage(tmp_path / "run", 1, [start(0), train(5, 10, memory_gb=5.0), train(10, 10), *questions])
    write_stage(tmp_path / "run", 2, [start(0, versions={"torch": "3.0"}), train(30, 30, memory_gb=4.0)])
    old = load_recipe("tiny", ["training.seed=7", "stages.connector_pretraining.lr=0.5"])
    (first / "recipe.yaml").write_text(dump_recipe(old))
    run = read(tmp_path / "run")
    assert validation_rows([run])[1] == ["run", "1 questions right", "10.0 %", "50.0 %", "30.0 %"]
    # 10 and 30 steps of half a second on 2 ranks, at 0.4 of 1e12 FLOPs a second.
    assert cost_rows([run])[-1] == ["run", "all", "40", "1,280", "", "0.0111", "", "16 T", "", "5.00 GB"]
    assert version_rows([run])[1:] == [["torch", "3.0"]]
    assert run.flat_recipe["training.seed"] == 0
    assert run.flat_recipe["stages.connector_pretraining.lr"] == 0.5


def test_recipes_that_differ_in_name_alone(tmp_path: Path) -> None:
    for name, more in (("one", []), ("other", []), ("third", ["training.seed=3"])):
        stage = write_stage(tmp_path / name, 1, [start(0), train(1, 1)])
        (stage / "recipe.yaml").write_text(dump_recipe(load_recipe("tiny", [f"name={name}", *more])))
    assert difference_rows(read_runs([tmp_path / "one", tmp_path / "other"])) == []
    rows = difference_rows(read_runs([tmp_path / "one", tmp_path / "third"]))
    assert rows == [["", "one", "third"], ["training.seed", "0", "3"]]


def test_warnings_are_of_what_happens_often(tmp_path: Path) -> None:
    """A rank that is slow in a tenth of the lines, not one that was once; the first five of many steps."""
    lines = [train(step, 20, loss=None if step > 13 else 1.0) for step in range(1, 21)]
    for line in lines[:2]:
        line |= {"slowest_ratio": 1.5, "slowest_rank": 3}
    lines[2] |= {"slowest_ratio": 1.5, "slowest_rank": 0}
    lines[-1]["cut_samples"] = 1200.0
    write_stage(tmp_path / "run", 1, [start(0), *lines])
    assert warnings([read(tmp_path / "run")]) == [
        "stage 1: the loss was not finite at steps 14, 15, 16, 17, 18 and 2 more",
        "stage 1: rank 3 held the others up (compute, 1.3 times or more), 2 of 20 lines",
        "stage 1: 1,200 samples were longer than data.max_length and cut",
    ]


def test_results_of_a_run(tmp_path: Path) -> None:
    """The right and the shuffled pictures; results in the run's own folder too; of many maps the last."""
    write_stage(tmp_path / "run", 1, [start(0), train(1, 1)])
    write_results(tmp_path / "run")
    found = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    (tmp_path / "run" / "results.json").write_text(json.dumps(found))
    run = read(tmp_path / "run")
    assert [row[1] for row in benchmark_rows([run])[1:]] == [".", "eval"]
    assert answer_rows([run])[2:] == [
        ["run", "count", "0 %", "0 to 79", "100 %", "1"],
        ["run", "all", "50 %", "9 to 91", "50 %", "2"],
    ]
    maps = tmp_path / "run" / "stage1" / "maps"
    for number in range(MOST_PICTURES + 2):
        Image.new("L", (2, 2)).save(maps / f"step-{number:06}.png")
    shown = pictures(run)
    assert f"step-{MOST_PICTURES + 1:06}" in shown
    assert "step-000003" not in shown
    assert "pictures shuffled" in render_report([run])
