"""The command, its results file, and the figures of docs/cost.md."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from cost_recipes import tiny_recipe

from hive_ds.cli import main
from hive_ds.config import Recipe
from hive_ds.cost import claims, measured
from hive_ds.cost.claims import Arm, compare, with_routes
from hive_ds.cost.counted import watch_step
from hive_ds.cost.ledger import cost_of_stage
from hive_ds.cost.measured import MeasuredStep, measure_step
from hive_ds.cost.model import random_model
from hive_ds.cost.pictures import draw
from hive_ds.cost.tables import peaks, tables
from hive_ds.cost.workload import Workload
from hive_ds.recipe import dump_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "cost_paper.json"
PAPER, SA = "hive-siglip-l-mobilellm-600m", "sa-siglip-l-mobilellm-600m"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Files of a tiny recipe and of its SA."""
    paths = []
    for name in ("tiny", "tiny-sa"):
        paths.append(str(tmp_path / f"{name}.yaml"))
        Path(paths[-1]).write_text(dump_recipe(tiny_recipe(tmp_path, name)))
    return paths[0], paths[1]


def test_the_command_prints_and_writes_what_the_library_says(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cost.json"
    options = ["--text-length", "9", "--batch", "2", "--ranks", "2", "--measure", "--json", str(out)]
    assert main(["cost", files[0], "--against", files[1], "--stage", "3", *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Stage 3, vision_finetuning: micro-batch of 2 images and texts of 9 tokens, 2 ranks, zero3" in printed
    assert "not measured: no GPU" in printed or torch.cuda.is_available()
    first, second = json.loads(out.read_text())["stages"]
    assert (first["recipe"], second["recipe"]) == ("tiny", "tiny-sa")
    cost = cost_of_stage(load_recipe(files[0]), 3, text_length=9, batch=2, ranks=2)
    assert first["total_flops"] == cost.total_flops
    assert first["memory"] == cost.memory
    assert first["step_flops"] == cost.total_flops * 32 / 2


@pytest.mark.parametrize(
    ("key", "value", "said", "said_by_5"),
    [
        (
            "vision_encoder.num_hidden_layers",
            "four",
            "num_hidden_layers is 'four' in its config.json; expected a whole",
            "Field 'num_hidden_layers' expected int, got str",
        ),
        ("vision_encoder.num_hidden_layers", 0, *["num_hidden_layers is 0 in its config.json; expected a whole"] * 2),
        ("vision_encoder.hidden_size", "wide", "makes no model: TypeError: ", "'hidden_size' expected int, got str"),
        ("language_model.hidden_size", [3], "makes no model: TypeError: ", "'hidden_size' expected int, got list"),
        ("language_model.num_attention_heads", 0, *[": ZeroDivisionError: "] * 2),
    ],
)
def test_a_config_that_makes_no_model_is_named(
    key: str, value: object, said: str, said_by_5: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers 5 checks the types in a config itself."""
    part, name = key.split(".")
    folder = Path(getattr(load_recipe(files[0]).model, part))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, name: value}))
    assert main(["cost", files[0], "--stage", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(folder) in line
    assert (said if transformers.__version__.startswith("4.") else said_by_5) in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curves"], "--curves compares two recipes; expected one --against, got 0"),
        (["--picture", "x.png"], "--picture draws the curves; expected --curves beside it"),
        (["--ranks", "0"], "--ranks 0: expected a number of at least 1"),
        (["--batch", "0"], "--batch 0: expected a number of at least 1"),
        (["--ranks", "5"], "global_batch_size 32 is not divisible by 5 ranks"),
        (["--stage", "7"], "--stage 7: no recipe here has it"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", files[0], *options]) == 2
    assert message in capsys.readouterr().err


def test_curves_of_tiny_models(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims, "ROUTES", (3, 2))
    monkeypatch.setattr(claims, "STAGES", (1, 3))
    monkeypatch.setattr(claims, "TEXT_LENGTHS", (8, 64))
    monkeypatch.setattr(claims, "BATCHES", (4, 32))
    hive, sa = load_recipe(files[0]), load_recipe(files[1])
    curves = compare(hive, sa, lambda line: None)
    assert curves == json.loads(json.dumps(curves))
    for point in curves["memory"]:
        for setup, both in point["peaks"].items():
            assert point["saved"][setup] == 1 - both["hive"] / both["sa"]
    for row in curves["holds"]:
        arms = [Arm.of(with_routes(hive, row["routes"]), row["stage"]), Arm.of(sa, row["stage"])]
        limit = claims.LIMITS[row["claim"]]
        ratios = [claims._ratio(*arms, length, encoder=row["encoder_counted"]) for length in range(1, 65)]
        assert row["up_to"] == sum(ratio < limit for ratio in ratios)
    assert draw(curves).startswith(b"\x89PNG")
    assert main(["cost", files[1], "--against", files[0], "--stage", "1", "--batch", "1", "--curves"]) == 2
    assert "curves compare a recipe of kind hive with one of kind cascaded" in capsys.readouterr().err


def test_a_step_is_measured(tmp_path: Path) -> None:
    step = measure_step(tiny_recipe(tmp_path), 2, Workload(2, 7), torch.device("cpu"), steps=2)
    assert (step.device, step.peak_bytes) == ("cpu", None)
    assert step.seconds > 0


def test_steps_that_warm_up_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = accumulate([9.0, 9.0, 9.0, 1.0, 3.0, 2.0])  # seconds of each step, with none between two
    clock = iter([0.0, *(moment for end in ends for moment in (end, end))])
    monkeypatch.setattr(measured, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measure_step(tiny_recipe(tmp_path), 2, Workload(2, 7), torch.device("cpu"), steps=3).seconds == 2.0


def test_routes_are_given_to_recipes_that_have_some(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--routes", "2", "--stage", "1", "--batch", "1", "--text-length", "9"]
    assert main(["cost", files[0], "--against", files[1], *options]) == 0
    assert capsys.readouterr().err == ""


def test_all_stages_are_costed_where_none_is_named(files: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    assert main(["cost", files[0], "--batch", "1", "--text-length", "9", "--json", str(out)]) == 0
    assert [cost["stage"] for cost in json.loads(out.read_text())["stages"]] == [1, 2, 3, 4, 5]


def test_recipes_of_one_name_are_measured_each(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is based on the other has its name where it gives none of its own."""
    asked: list[tuple[str, int, Workload]] = []

    def measure(recipe: Recipe, stage: int, workload: Workload, device: torch.device) -> MeasuredStep:
        asked.append((recipe.training.precision, stage, workload))
        return MeasuredStep("a GPU", 0.25, 3 * 10**9)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measured, "measure_step", measure)
    Path(files[1]).write_text(f"base: {files[0]}\ntraining: {{precision: bf16}}\n")
    options = ["--stage", "1", "--batch", "2", "--text-length", "9", "--measure"]
    assert main(["cost", files[0], "--against", files[1], *options]) == 0
    assert asked == [(precision, 1, Workload(2, 9)) for precision in ("fp32", "bf16")]
    assert capsys.readouterr().out.endswith("tiny, stage 1: 250.0 ms, 3.00 GB on a GPU\n" * 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_measured_step_is_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    asked = ("model.language_loss=plain", "model.vision_attention=eager", f"training.compile={str(compiled).lower()}")
    made: list[Any] = []
    pieces: list[Any] = []
    monkeypatch.setattr(measured, "random_model", lambda *of: made.append(random_model(*of)) or made[-1])
    monkeypatch.setattr(measured, "compile_blocks", lambda model, *_: pieces.append(model))
    measure_step(tiny_recipe(tmp_path, "tiny", *asked), 2, Workload(2, 7), torch.device("cpu"), steps=1)
    ((model, _),) = made
    assert pieces == [model] * compiled
    assert model.language_loss.backend == "plain"
    assert model.vision_encoder.config._attn_implementation == "eager"


def test_the_document_shows_the_committed_figures() -> None:
    document = (ROOT / "docs" / "cost.md").read_text()
    for table in tables(json.loads(RESULTS.read_text())["curves"]):
        assert table in document
    checkpointing = json.loads((RESULTS.parent / "cost_checkpointing.json").read_text())
    assert peaks(checkpointing["stages"]) in document


def test_the_committed_figures_are_what_the_code_computes() -> None:
    results = json.loads(RESULTS.read_text())
    for stage, routes in ((1, 8), (3, 6)):
        arm, baseline = Arm.of(with_routes(load_recipe(PAPER), routes), stage), Arm.of(load_recipe(SA), stage)
        place = {"stage": stage, "routes": routes}
        found = [place | row for row in claims._where_flops_hold(arm, baseline)]
        assert found == [row for row in results["curves"]["holds"] if place.items() <= row.items()]
        for point in results["curves"]["flops"]:
            if place.items() <= point.items():
                assert point["hive"] == arm.parts(point["text_length"])
                assert point["sa"] == baseline.parts(point["text_length"])
    stages = {(cost["recipe"], cost["stage"]): cost for cost in results["stages"]}
    committed = stages[PAPER, 1]
    watch = watch_step(Arm.of(load_recipe(PAPER), 1).model, Workload(committed["batch"], committed["text_length"]))
    assert committed["memory"]["activations"] == watch.activations
