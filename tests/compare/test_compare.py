"""The comparison: what its page says, and the whole of it at a size that learns nothing."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hive_ds.ablation.gather import Gathered
from hive_ds.cli import main
from hive_ds.compare import judge as judging
from hive_ds.compare import pipeline
from hive_ds.compare.page import JUDGED, _intervals, contrasts, render_page
from hive_ds.compare.pipeline import Comparison
from hive_ds.compare.settings import ARMS, PRESETS, SMOKE
from hive_ds.data.scenes_samples import SceneFolders
from hive_ds.errors import HiveError
from hive_ds.evaluation.probes.results import BlockResult, Score
from hive_ds.evaluation.probes.scene_factors import FACTORS
from hive_ds.evaluation.probes.settings import LinearSettings, ProbeSettings
from hive_ds.evaluation.scoring import Share
from hive_ds.recipe import dump_recipe, load_recipe


def gathered(spread: float) -> Gathered:
    """HIVE ten points better than base, give or take ``spread`` from seed to seed, in every score."""
    names = (*JUDGED, "stage 4 seconds", "stage 4 GB")
    shift = (0.0, spread, -spread)
    scores = {
        "hive": {seed: dict.fromkeys(names, 0.6 + shift[seed]) for seed in range(3)},
        "base": {seed: dict.fromkeys(names, 0.5) for seed in range(3)},
    }
    return Gathered(scores, ("sa-seed0",))


def test_page_says_what_differs_and_what_could_not_be_told() -> None:
    for spread, verdict in ((0.01, "yes"), (0.2, "no")):
        found = gathered(spread)
        record = {
            "contrasts": [one.as_dict() for one in contrasts(found)],
            "hardware": "2 CPU cores, no GPU",
            "date": "2026-11-26",
            "versions": {"torch": "2"},
            "seconds_by_step": {"runs": 60.0},
        }
        page = render_page(found, record, held_out=100)
        # t of 2 degrees: 4.3027 at 97.5 %, passed in 80 % of cases where the mean is 5.6535 errors off zero.
        error = 100 * spread / 3**0.5
        interval = f"{10 - 4.3027 * error:+.1f} to {10 + 4.3027 * error:+.1f}"
        cells = ["answers all", "hive", "base", "+10.0", interval, verdict, f"{5.6535 * error:.1f}"]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
        assert page.count("<circle ") == len(record["contrasts"])
        assert [page.count(f'font-weight="600">{score}</text>') for score in JUDGED] == [1] * len(JUDGED)
        assert all(f"interval {where}<" in page for where in ("above zero", "below zero", "holds zero"))
        assert page.count('stroke="var(--one)" stroke-width="2"') == len(record["contrasts"]) * (verdict == "yes")
        assert "sa-seed0" in page
        assert "± 9.8 points" in page  # 1.96 sqrt(0.25 / 100)
        # Shares in percent, cost as it is; an interval's name has the order of its difference.
        assert f"<td>answers all</td><td>60.0 ± {100 * spread:.1f}</td><td>50.0 ± 0.0</td>" in page
        assert f"<td>stage 4 seconds</td><td>0.6 ± {spread:.1f}</td><td>0.5 ± 0.0</td>" in page
        assert "<td>stage 4 GB</td>" in page
        assert page.count(">hive \N{MINUS SIGN} base</text>") == len(JUDGED)


@pytest.mark.parametrize("given", [None, "base/encoder"])
def test_a_run_is_judged_at_the_block_that_its_vlm_reads(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last but one of four; the best one, and the answers over shuffled pictures, are scores of their own. Without
    stages 1 to 3 the encoder is the one that the recipe names."""
    results = [
        BlockResult("encoder", factor, block, 2, 8, 10, (Score(0, Share(right, 10), 0.0),))
        for factor in FACTORS
        for block, right in ((1, 4), (2, 8), (3, 6), (4, 5))
    ]
    answers = SimpleNamespace(
        accuracy={"colour": Share(3, 4), "all": Share(5, 8)}, shuffled_accuracy={"all": Share(1, 8)}, save=Path.touch
    )
    asked: list[Any] = []
    encoder = SimpleNamespace(info=SimpleNamespace(name="encoder", num_blocks=4))

    def ask(*given: Any, template: str, **_: Any) -> Any:
        asked.extend([*given, template])
        return answers

    monkeypatch.setattr(judging, "ask", ask)
    monkeypatch.setattr(judging, "load_encoder", lambda source: asked.append(source) or encoder)
    monkeypatch.setattr(judging, "scene_probe_data", lambda train, held_out: (train, held_out))
    monkeypatch.setattr(judging, "read_samples", lambda folder: [folder] * 3000)
    monkeypatch.setattr(judging, "probe", lambda encoder, *more: asked.extend(more) or results)
    recipe = load_recipe("tiny", [f"vlm.vision_encoder={given or 'null'}"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    data = SceneFolders(tmp_path / "data")
    scores = judging.judge(tmp_path, data)
    assert asked == [
        *(tmp_path / "stage5" / "model", [data.questions] * 3000, "chat"),
        given or str(tmp_path / "encoder"),
        ([data.train] * 2400, [data.validation] * 3000),
        ProbeSettings(LinearSettings(l2=1e-3), "all", (0,)),
    ]
    assert scores == {
        **{"answers colour": 0.75, "answers all": 0.625, "answers all, pictures shuffled": 0.125},
        **{f"probe {factor}": 0.6 for factor in FACTORS},
        **{f"probe {factor}, best block": 0.8 for factor in FACTORS},
    }


def test_runs_are_judged_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(pipeline, "run_all", lambda runs, launcher, **more: asked.update(more))
    monkeypatch.setattr(Comparison, "_plan", lambda self: [])
    Comparison(tmp_path / "my runs", SMOKE)._runs()
    judge = [sys.executable, "-m", "hive_ds.compare.judge", "{run}", str(tmp_path / "my runs" / "data")]
    assert shlex.split(asked["after"]) == judge
    assert asked["jobs"] == 2


def test_runs_are_those_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "make_plan", lambda *given: given)
    recipe, overrides, *which = Comparison(tmp_path, replace(SMOKE, seeds=(4, 5)))._plan()
    made = load_recipe(recipe, overrides)
    assert which == [("hive", "base"), (4, 5), tmp_path / "runs"]
    assert (made.data.train, made.data.text_validation) == (str(tmp_path / "data" / "train"), None)
    assert made.model.vision_encoder == str(tmp_path / "base" / "vision_encoder")
    assert made.vlm is not None
    assert made.vlm.language_model == made.model.language_model == str(tmp_path / "base" / "language_model")
    assert {stage.steps for stage in made.stages.values()} == {2}


def test_arms_are_compared_by_the_seeds_that_both_have() -> None:
    scores = {arm: {0: {"answers all": 0.5, "probe count": 0.25}, 1: {"answers all": 0.75}} for arm in ARMS}
    scores["hive"][1] = {"answers all": 1.0, "probe count": 1.0}
    scores["hive"][2] = {"answers all": 0.0}
    found = contrasts(Gathered(scores, ()))
    assert [(one.arm, one.reference) for one in found] == [
        *(("hive", "base"), ("hive", "sa"), ("hive", "last"), ("sa", "base"), ("last", "base"))
    ]
    assert {one.name for one in found} == {"answers all"}  # one seed has both probes, which tells no spread
    assert found[0].differences == (0.0, 0.25)


def test_scores_of_a_plot_stand_in_the_order_of_the_table() -> None:
    found = [one.as_dict() for one in contrasts(gathered(0.01))]
    assert list(_intervals(found[::-1])) == list(JUDGED)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_the_recipe(name: str) -> None:
    recipe = load_recipe("tiny", PRESETS[name].made.overrides)
    routes, made = recipe.model.routes, PRESETS[name].made
    assert routes is not None
    assert max(routes.vision_blocks) < made.vision_encoder.blocks
    assert max(routes.language_layers) < made.language_model.layers
    assert {stage.global_batch_size % stage.micro_batch_size for stage in recipe.stages.values()} == {0}


def test_seeds_are_looked_at_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--preset", "smoke", "--seeds", "1,0,1", "--out", str(tmp_path / "out")]) == 2
    assert "seeds: 1, 0, 1; expected at least one, each once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_preset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(HiveError, match="was made with made None, not"):
        Comparison(tmp_path, SMOKE).run()
    for damaged in ("", "[1]", '{"made": '):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(HiveError, match=r"settings.json: .*; expected what the folder was made with; choose"):
            Comparison(tmp_path, SMOKE).run()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_whole_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = (3, 5)
    assert main(["compare", "--preset", "smoke", "--seeds", "3,5", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "index.html").is_file()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["missing"] == []
    for arm in SMOKE.arms:
        for seed in seeds:
            scores = results["scores"][arm][str(seed)]
            assert set(JUDGED) <= scores.keys()
            assert all(0 <= scores[name] <= 1 for name in JUDGED)
    # Both seeds of `base` end with the encoder that they began with: their probes are the same.
    base = results["scores"]["base"]
    assert {name: base["3"][name] for name in JUDGED[1:]} == {name: base["5"][name] for name in JUDGED[1:]}
    assert {one["reference"] for one in results["contrasts"]} == {"base"}
    assert main(["compare", "--preset", "smoke", "--seeds", "3,5", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("done before") == 4


ROWS = {
    "answers of the LLaVA-style model, 1,200 questions": "answers all",
    "the same, pictures shuffled": "answers all, pictures shuffled",
    "probe of colour": "probe colour",
    "probe of shape": "probe shape",
    "probe of size": "probe size",
    "probe of count": "probe count",
    "probe of relation (a blind guess gets 25)": "probe relation",
    "probe of text": "probe text",
}


def test_figures_of_the_docs_are_those_of_the_results() -> None:
    docs = Path(__file__).parents[2] / "docs"
    results, page = json.loads((docs / "results" / "compare.json").read_text()), (docs / "ablations.md").read_text()
    for words, name in ROWS.items():
        cells = [results["summary"][arm][name] for arm in ("hive", "sa", "last", "base")]
        row = " | ".join(f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f}" for cell in cells)
        assert f"| {words} | {row} |" in page
    total = {
        arm: sum(results["summary"][arm][f"stage {stage} TFLOPs"]["mean"] for stage in (1, 2, 3))
        for arm in ("hive", "sa", "last")
    }
    assert " | ".join(f"{total[arm]:.1f}" for arm in ("hive", "sa", "last")) + " | none |" in page
    assert f"{100 * total['hive'] / total['sa']:.0f} % of the model FLOPs of SA" in page
    for reference in ("base", "sa", "last"):
        (found,) = (
            one
            for one in results["contrasts"]
            if (one["score"], one["arm"], one["reference"]) == ("answers all", "hive", reference)
        )
        assert f"{100 * found['mean']:+.1f} points of answers" in page
        assert found["differs"] == (reference == "base")
