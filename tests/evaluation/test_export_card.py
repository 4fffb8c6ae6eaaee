"""The model card says where an encoder comes from, what it cost, and whose scores it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from export_models import save_hive

from hive_ds.cli import main
from hive_ds.errors import HiveError
from hive_ds.export import export_encoder
from hive_ds.export.run_facts import _licence_block, licences, read_stage
from hive_ds.model.identity import folder_sha256
from hive_ds.recipe import dump_recipe, load_recipe

RECIPE = "hive-siglip-so400m-qwen2-0.5b"
START = {"event": "start", "ranks": 4, "device": "NVIDIA H200", "matmul_flops_per_second": 1e12, "versions": {}}


def train(step: int, seconds: float, mfu: float) -> dict:
    return {
        "event": "train",
        "step": step,
        "samples": 8 * step,
        "seconds_per_step": seconds,
        "mfu": mfu,
        "loss": 1 / step,
    }


def make_run(run: Path) -> Path:
    """A run whose stage 3 has gone on from its checkpoint at step 20 on 2 ranks; a kill cut its last line short."""
    stage = run / "stage3"
    save_hive(stage / "model")
    (stage / "DONE").touch()
    (stage / "recipe.yaml").write_text(dump_recipe(load_recipe(RECIPE)))
    events = [
        {**START, "step": 0},
        train(10, 3.0, 0.4),
        train(20, 1.0, 0.5),
        {**START, "step": 20, "ranks": 2, "versions": {"torch": "9.8.7"}},
        {"event": "checkpoint", "step": 25, "seconds": 100.0},
        train(30, 2.0, 0.25),
    ]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "tr')
    return run


def results(sha256: str | None, value: float) -> str:
    scores = [{"name": name, "value": value, "maximum": 1} for name in ("accuracy", "accuracy.part")]
    asked = {"prompt_version": "gqa-2", "samples": 2, "available": 5}
    return json.dumps({"vision_encoder_sha256": sha256, "benchmarks": {"gqa": {**asked, "scores": scores}}})


def test_cost_is_the_sum_of_what_was_logged(tmp_path) -> None:
    facts = read_stage(make_run(tmp_path) / "stage3")
    assert facts is not None
    assert (facts.steps, facts.samples, facts.loss) == (30, 240, 1 / 30)
    assert facts.devices == "4 x NVIDIA H200, 2 x NVIDIA H200"
    seconds = [10 * 3.0 * 4, 10 * 1.0 * 4, 10 * 2.0 * 2]
    assert facts.hours * 3600 == pytest.approx(sum(seconds))
    assert facts.flops == pytest.approx(1e12 * sum(map(float.__mul__, seconds, (0.4, 0.5, 0.25))))
    assert facts.mfu == pytest.approx(facts.flops / (1e12 * sum(seconds)))
    assert read_stage(tmp_path) is None


def test_the_card_tells_the_run(tmp_path) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    sha256 = folder_sha256(run / "stage3" / "model")
    for name, text in {"eval": results(sha256, 0.625), "other": results("0" * 64, 0.375)}.items():
        (run / name).mkdir()
        (run / name / "results.json").write_text(text)
    report = export_encoder(run, out)
    assert load_recipe(out / "recipe.yaml") == load_recipe(RECIPE)
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert f"Weights, sha256: `{report.sha256}`" in card
    assert report.sha256 == report.trained_sha256 == sha256
    for words in (
        "Block 4, the final norm and the pooling head come after the last routed block",
        "Routes (vision block -> LLM layer): 1->1, 3->3",
        "| vision encoder | google/siglip-so400m-patch14-384 |",
        "| data, train | data/cc3m-florence |",
        "| stage3 | 30 | 240 | 4 x NVIDIA H200, 2 x NVIDIA H200 | 0.05556 | 7.8e+13 | 0.03333 |",
        "Qwen/Qwen2-0.5B Apache-2.0",
        "| torch | 9.8.7 |",
        "| eval/results.json | gqa | gqa-2 | 2 of 5 | accuracy | 0.625 | 1 |",
    ):
        assert words in card
    assert "llava" not in card  # data of stage 4, which this encoder has not seen
    assert "0.375" not in card  # scores of another encoder
    assert "accuracy.part" not in card  # part of a main score: in the file
    assert list(json.loads((out / "scores.json").read_text())) == ["eval/results.json"]


def test_the_card_sums_up_all_stages_and_names_all_data(tmp_path: Path) -> None:
    """Stage 1 ended with a loss that was no number; the results lie two folders deep, and are of the encoder before
    its end was cut."""
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    (run / "stage1").mkdir()
    events = [{**START, "step": 0, "ranks": 2}, {**train(10, 9.0, 0.5), "loss": None}]
    (run / "stage1" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    given = ["data.train={one: 1, two: 0.5}", "data.validation=three", "data.text_validation=four", "training.seed=7"]
    (run / "stage3" / "recipe.yaml").write_text(dump_recipe(load_recipe(RECIPE, given)))
    (run / "evaluation" / "first").mkdir(parents=True)
    judged = results(folder_sha256(run / "stage3" / "model"), 0.625)
    (run / "evaluation" / "first" / "results.json").write_text(judged)
    export_encoder(run, out, tail="cut")
    card = (out / "README.md").read_text()
    for words in (
        "| stage1 | 10 | 80 | 2 x NVIDIA H200 | 0.05 | 9e+13 |  |",
        "| together | 40 | 320 |  | 0.1056 | 1.68e+14 |  |",
        "| data, train | one (1.0), two (0.5) |",
        "| data, validation | three |",
        "| data, text validation | four |",
        "| seed | 7 |",
        "| evaluation/first/results.json | gqa | gqa-2 |",
    ):
        assert words in card


def test_scores_of_another_encoder_are_refused(tmp_path) -> None:
    run = make_run(tmp_path / "run")
    file = tmp_path / "mine.json"
    file.write_text(results("0" * 64, 0.5))
    with pytest.raises(HiveError, match="its vision_encoder_sha256 is 0000"):
        export_encoder(run, tmp_path / "out", scores=file)
    file.write_text("{")
    with pytest.raises(HiveError, match="expected a JSON file"):
        export_encoder(run, tmp_path / "out", scores=file)
    file.write_text(json.dumps({"food101": 0.5}))  # says nothing of an encoder: the user's word is taken
    export_encoder(run, tmp_path / "out", tail="cut", scores=file)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == {"mine.json": {"food101": 0.5}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "out", "run"]


def test_licences_are_those_of_the_recipe_and_its_base() -> None:
    lines = licences(RECIPE)
    assert lines[0].startswith("Licences: google/siglip-so400m-patch14-384 Apache-2.0")
    assert any("CC3M" in line for line in lines)  # of the recipe that it is based on
    assert not any(line.startswith(("name", "The paper")) for line in lines)
    assert licences("a recipe of my own") == []
    assert _licence_block("# Mine\n# Licences: a\n# and b\n#\n# More\nname: c\n") == ["Licences: a", "and b"]


@pytest.mark.parametrize("tail", ["keep", "cut"])
def test_an_encoder_that_no_stage_has_trained_says_so(tmp_path, capsys, tail) -> None:
    """Stage 2 is the last finished one; stage 3, which would train it, has begun."""
    run = tmp_path / "run"
    for number in (1, 2):
        save_hive(run / f"stage{number}" / "model")
        (run / f"stage{number}" / "DONE").touch()
    (run / "stage3").mkdir()
    report = export_encoder(run, tmp_path / "out", tail=tail)
    assert report.untrained == (
        "stage 2 does not train the vision encoder (stage 3 does): these are the weights that the run started from"
    )
    assert report.trained_blocks == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Vision encoder not yet trained with HIVE\n" in card
    assert f"blocks. **Not trained: {report.untrained}.**" in card
    assert "trained through a language model" not in card
    assert ("no gradient reached them" in card, "cut. The final norm is new" in card) == (False, tail == "cut")
    assert main(["export", "encoder", str(run), str(tmp_path / "again"), "--tail", tail]) == 0
    said = capsys.readouterr().out
    assert f"warning: {report.untrained}\n" in said
    assert "blocks, none of them trained, features" in said
    (run / "stage3" / "DONE").touch()
    save_hive(run / "stage3" / "model")
    report = export_encoder(run, tmp_path / "trained")
    assert (report.untrained, report.trained_blocks) == (None, 3)


def test_a_model_outside_of_a_run_says_so(tmp_path) -> None:
    save_hive(tmp_path / "model")
    assert export_encoder(tmp_path / "model", tmp_path / "out").untrained is None
    assert "lies in no run: its recipe is not known" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("stage3/recipe.yaml", ""),
        ("stage3/recipe.yaml", "name: [a"),
        ("stage3/recipe.yaml", "[1]"),
        ("stage3/recipe.yaml", "name: a\nmodel: 3\n"),
        ("stage3/recipe.yaml", "\0\x01"),
        ("stage3/metrics.jsonl", '{"event": "start"}\n{"event": "train"}\n'),
        ("stage3/metrics.jsonl", '{"event": "start", "step": 0}\n'),
        ("eval/results.json", "{"),
        ("eval/results.json", '{"vision_encoder_sha256": "SHA", "benchmarks": [1]}'),
        ("eval/results.json", '{"vision_encoder_sha256": "SHA", "benchmarks": {"gqa": {"scores": [{}]}}}'),
    ],
)
def test_damaged_files_of_the_run_are_named(tmp_path: Path, capsys, file: str, text: str) -> None:
    run = make_run(tmp_path / "run")
    damaged = run / file
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text(text.replace("SHA", folder_sha256(run / "stage3" / "model")))
    assert main(["export", "encoder", str(run), str(tmp_path / "out")]) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert all(not one or "weights:" in one or "shards:" in one for one in before), before  # bars of transformers 5
    assert line.startswith("error: ")
    assert f"{file}: " in line
    assert "; expected " in line
    assert not (tmp_path / "out").exists()
