"""Ablations: arms against the recipes that ship, the published routes, runs by a stand-in trainer."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import ttest_rel
from tiny_models import text_config, vision_config

from hive_ds.ablation.arms import Depths, make_arms
from hive_ds.ablation.contrast import contrast
from hive_ds.ablation.execute import _environment, run_all, submit_all
from hive_ds.ablation.gather import gather
from hive_ds.ablation.plan import ArmRun, make_plan, read_plan
from hive_ds.cli import main
from hive_ds.config import RoutesConfig
from hive_ds.errors import HiveError, Signalled
from hive_ds.model.routes import spread_routes
from hive_ds.recipe import load_recipe

PAPER = "hive-siglip-l-mobilellm-600m"
PAPER_DEPTHS = Depths(blocks=24, layers=40)
ARMS = ("hive", "base", "routes-2")

TRAINER = """
import json, pathlib, sys
import yaml
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
recipe = yaml.safe_load(open(given["--recipe"]))
folder = pathlib.Path(given["--run-folder"]) / f"stage{given['--stage']}"
if recipe["training"]["seed"] == 9:
    sys.exit("planted")
folder.mkdir(parents=True)
seed, arm = recipe["training"]["seed"], pathlib.Path(given["--run-folder"]).name.split("-seed")[0]
loss = 2.0 - 0.1 * seed - 0.25 * (arm == "hive") - 0.01 * seed * (arm == "hive")
train = {"event": "train", "loss": 1.0}
lines = [
    {"event": "start", "step": 0, "ranks": 2, "device": "CPU", "matmul_flops_per_second": 1e12},
    {**train, "step": 2, "samples": 8, "seconds_per_step": 3.0, "mfu": 0.5, "memory_gb": 1.0},
    {**train, "step": 5, "samples": 20, "seconds_per_step": 1.0, "mfu": 0.25, "memory_gb": 2.0},
    {"event": "validation", "step": 3, "loss": 9.0},
    {"event": "validation", "step": 5, "loss": loss, "text_loss": None},
]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(folder / "DONE").touch()
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe of all five stages over two models of which only the configs are there."""
    vision_config().save_pretrained(tmp_path / "encoder")
    text_config().save_pretrained(tmp_path / "language_model")
    path = tmp_path / "recipe.yaml"
    models = f"{{vision_encoder: {tmp_path}/encoder, language_model: {tmp_path}/language_model}}"
    path.write_text(f"base: tiny\nname: small\nmodel: {models}\n")
    return str(path)


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    (tmp_path / "trainer.py").write_text(TRAINER)
    return [sys.executable, str(tmp_path / "trainer.py")]


@pytest.mark.parametrize("kind", ["sa", "base", "last"])
def test_baselines_are_the_recipes_that_ship(kind: str) -> None:
    recipe = load_recipe(PAPER)
    (arm,) = make_arms([kind], recipe, PAPER_DEPTHS)
    made = load_recipe(PAPER, arm.overrides)
    suffix = PAPER.removeprefix("hive-")
    shipped = load_recipe("base-siglip-l" if kind == "base" else f"{kind}-{suffix}")
    assert replace(made, name=shipped.name, description=shipped.description) == shipped


@pytest.mark.parametrize(
    ("count", "layers", "expected_blocks", "expected_layers"),
    [
        (8, 40, [2, 5, 8, 11, 14, 17, 20, 23], [4, 9, 14, 19, 24, 29, 34, 39]),
        (12, 40, list(range(1, 24, 2)), [3, 7, 11, 15, 18, 21, 24, 27, 30, 33, 36, 39]),
        (6, 40, [3, 7, 11, 15, 19, 23], [6, 13, 20, 27, 33, 39]),
        (4, 40, [5, 11, 17, 23], [9, 19, 29, 39]),
        (2, 40, [11, 23], [19, 39]),
        (23, 40, list(range(1, 24)), [*range(2, 33, 2), *range(33, 40)]),
        (6, 54, [3, 7, 11, 15, 19, 23], [8, 17, 26, 35, 44, 53]),
        (6, 32, [3, 7, 11, 15, 19, 23], [5, 11, 16, 21, 26, 31]),
        (6, 30, [3, 7, 11, 15, 19, 23], [4, 9, 14, 19, 24, 29]),
    ],
)
def test_routes_are_the_published_ones(
    count: int, layers: int, expected_blocks: list[int], expected_layers: list[int]
) -> None:
    assert spread_routes(count, 24, layers) == (tuple(expected_blocks), tuple(expected_layers))


@pytest.mark.parametrize("blocks", range(2, 40))
def test_any_number_of_routes_fits(blocks: int) -> None:
    for count in range(1, blocks):
        vision, language = spread_routes(count, blocks, 40)
        assert len(set(vision)) == len(set(language)) == count
        assert list(vision) == sorted(vision)
        assert vision[0] >= 1
        assert (vision[-1], language[-1]) == (blocks - 1, 39)
    with pytest.raises(HiveError, match=f"{blocks} routes: expected 1 to {blocks - 1}"):
        spread_routes(blocks, blocks, 40)


def test_plan_changes_nothing_but_the_arm(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = make_plan(recipe, ["training.precision=bf16"], ARMS, (0, 3), out)
    assert [run.name for run in runs] == [f"{arm}-seed{seed}" for seed in (0, 3) for arm in ARMS]
    assert runs == make_plan(recipe, ["training.precision=bf16"], ARMS, (0, 3), out) == read_plan(out)
    by_name = {run.name: load_recipe(run.recipe) for run in runs}
    hive, routes, base = (by_name[f"{arm}-seed3"] for arm in ("hive", "routes-2", "base"))
    assert (hive.training.seed, hive.training.precision) == (3, "bf16")
    assert (hive.data, hive.training, hive.stages) == (routes.data, routes.training, routes.stages)
    assert routes.model.routes is not None
    assert (routes.model.routes.vision_blocks, routes.model.routes.language_layers) == ((1, 3), (2, 4))
    assert [run.stages for run in runs[:2]] == [(1, 2, 3, 4, 5), (4, 5)]
    assert base.vlm is not None
    assert base.vlm.vision_encoder == hive.model.vision_encoder
    with pytest.raises(HiveError, match="says something else; choose another folder"):
        make_plan(recipe, [], ARMS, (0, 3), out)


def test_the_last_block_is_read_once_by_a_layer_that_reads_several(recipe: str, tmp_path: Path) -> None:
    routes = "model.routes={vision_blocks: [1, 2, 3], language_layers: [1, 1, 3]}"
    (run,) = make_plan(recipe, [routes], ("last",), (0,), tmp_path / "out")
    assert load_recipe(run.recipe).model.routes == RoutesConfig(vision_blocks=(4, 4), language_layers=(1, 3))


@pytest.mark.parametrize(
    ("arms", "seeds", "message"),
    [
        (("hive", "sb"), (0,), "arm 'sb': expected one of hive, sa, base, last, routes-N"),
        (("hive", "hive"), (0,), "hive is named more than once"),
        (("routes-9",), (0,), "9 routes: expected 1 to 3 for 4 vision blocks"),
        (("hive",), (1, 1), "seeds: 1, 1; expected at least one, each once"),
    ],
)
def test_wrong_plans(recipe: str, tmp_path: Path, arms: tuple[str, ...], seeds: tuple[int, ...], message: str) -> None:
    with pytest.raises(HiveError, match=message):
        make_plan(recipe, [], arms, seeds, tmp_path / "out")
    assert not (tmp_path / "out" / "ablation.json").exists()


def test_base_needs_stages_that_judge(recipe: str, tmp_path: Path) -> None:
    none = ["vlm=null", "stages.vlm_alignment=null", "stages.vlm_instruction_tuning=null"]
    with pytest.raises(HiveError, match="small has no section vlm; expected one for arm base"):
        make_plan(recipe, none, ("base",), (0,), tmp_path / "out")


def test_runs_scores_and_differences(
    recipe: str, tmp_path: Path, launcher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    runs = make_plan(recipe, [], ("hive", "last"), (0, 1, 2), tmp_path / "out")
    judge = 'bash -c \'echo {\\"probe\\": 0.5, \\"threads\\": $OMP_NUM_THREADS} > {run}/scores.json\''
    run_all(runs, launcher, after=judge, jobs=2)
    gathered = gather(runs)
    assert gathered.missing == ()
    losses = {arm: [gathered.scores[arm][seed]["stage 5 loss"] for seed in (0, 1, 2)] for arm in ("hive", "last")}
    assert losses == {"hive": pytest.approx([1.75, 1.64, 1.53]), "last": pytest.approx([2.0, 1.9, 1.8])}
    cell = gathered.cell("last", "stage 5 loss")
    assert cell is not None
    assert (cell.mean, cell.std) == (pytest.approx(1.9), pytest.approx(0.1))
    scores = gathered.scores["hive"][1]
    assert [scores[f"stage 1 {name}"] for name in ("seconds", "TFLOPs", "GB")] == [9.0, 7.5, 2.0]
    assert scores["probe"] == 0.5
    assert scores["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)  # two jobs share out the cores
    found = contrast(gathered, "stage 5 loss", "hive", "last")
    assert found is not None
    expected = ttest_rel(losses["hive"], losses["last"])
    interval = expected.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.differs
    assert expected.pvalue < 0.05
    assert contrast(gathered, "no such score", "hive", "last") is None


def test_cores_are_shared_out_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert [_environment(jobs)["OMP_NUM_THREADS"] for jobs in (1, 2)] == ["7", "7"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "OMP_NUM_THREADS" not in _environment(1)  # one run alone takes them all
    assert _environment(10**6)["OMP_NUM_THREADS"] == "1"


def test_a_failed_run_is_named_and_the_others_go_on(
    recipe: str, tmp_path: Path, launcher: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    runs = make_plan(recipe, [], ("hive",), (9, 0), out)
    with pytest.raises(HiveError, match=r"1 of 2 runs failed: hive-seed9 stage 1 with exit code 1, see .*stage1\.log"):
        run_all(runs, launcher)
    assert "planted" in (out / "hive-seed9" / "stage1.log").read_text()
    with pytest.raises(HiveError, match="1 of 1 runs failed: hive-seed9 stage 1 with exit code 0, see"):
        run_all(runs[:1], ["true"])  # as one that is stopped before its end
    assert "planted" in (out / "hive-seed9" / "stage1.log").read_text()
    assert main(["ablate", "table", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "not finished, and left out: hive-seed9" in printed
    table = json.loads((out / "table.json").read_text())
    assert list(table["scores"]["hive"]) == ["0"]
    assert table["summary"]["hive"]["stage 5 loss"]["std"] is None


def test_sigterm_ends_all_runs(recipe: str, tmp_path: Path) -> None:
    """What a launcher leaves behind too; runs that wait do not begin."""
    runs = make_plan(recipe, [], ("hive",), (0, 1, 2), tmp_path / "out")
    (tmp_path / "ranks").mkdir()
    launcher = (
        f"cd {tmp_path}/ranks; setsid sleep 1000 & touch $!; [ $(ls | wc -l) = 1 ] || kill -TERM {os.getpid()}; wait"
    )
    with pytest.raises(Signalled) as caught:
        run_all(runs, ["sh", "-c", launcher], jobs=2)
    assert caught.value.exit_code == 143
    ranks = [Path("/proc", path.name, "cmdline") for path in (tmp_path / "ranks").iterdir()]
    assert len(ranks) == 2
    assert not any(rank.exists() and rank.read_text() for rank in ranks)  # empty: dead, and its parent has not asked


def test_a_failed_judge_is_named_and_the_others_go_on(recipe: str, tmp_path: Path, launcher: list[str]) -> None:
    runs = make_plan(recipe, [], ("hive",), (0, 1, 9, 2), tmp_path / "out")
    judge = "bash -c 'case {run} in *seed0) exit 3;; esac; touch {run}/judged'"
    with pytest.raises(HiveError, match=r"2 of 4 runs failed: hive-seed0: bash .* exit code 3; hive-seed9 stage 1"):
        run_all(runs, launcher, after=judge)
    assert [(run.folder / "judged").exists() for run in runs] == [False, True, False, True]
    with pytest.raises(HiveError, match=r"3 of 3 runs failed: hive-seed0: no-such-judge did not start: No such file"):
        run_all([run for run in runs if run.seed != 9], launcher, after="no-such-judge")


def test_cost_and_scores_say_what_they_are_of(recipe: str, tmp_path: Path, launcher: list[str]) -> None:
    """A run resumed on other devices counts each attempt's own; the first questions of a benchmark are not all."""
    (run,) = runs = make_plan(recipe, [], ("hive",), (0,), tmp_path / "out")
    run_all(runs, launcher)
    metrics = run.folder / "stage1" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines.insert(2, {**lines[0], "step": 2, "ranks": 4, "matmul_flops_per_second": 3e12})
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = [{"name": "accuracy", "value": 0.5}, {"name": "accuracy.part", "value": 0.25}]
    score = {"scores": parts, "available": 100}
    benchmarks = {"gqa": {**score, "samples": 100}, "mme": {**score, "samples": 2}}
    (run.folder / "eval").mkdir()
    (run.folder / "eval" / "results.json").write_text(json.dumps({"benchmarks": benchmarks}))
    scores = gather(runs).scores["hive"][0]
    expected = [9.0, 6 * 0.5 * 2 + 3 * 0.25 * 12, 2.0]
    assert [scores[f"stage 1 {name}"] for name in ("seconds", "TFLOPs", "GB")] == expected
    judged = {name: value for name, value in scores.items() if name.startswith(("gqa", "mme"))}
    assert judged == {"gqa accuracy": 0.5, "mme accuracy of the first 2": 0.5}


def test_submission_is_one_command_a_run(recipe: str, tmp_path: Path) -> None:
    runs: list[ArmRun] = make_plan(recipe, [], ("hive", "sa"), (0,), tmp_path / "out")
    script = f"import sys; open({str(tmp_path / 'said')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')"
    submit_all(runs, [sys.executable, "-c", script, "--nodes", "4"])
    said = (tmp_path / "said").read_text().splitlines()
    assert said == [f"--nodes 4 --recipe {run.recipe} --run {run.folder}" for run in runs]
    with pytest.raises(HiveError, match="run hive-seed0 was not submitted: false ended with exit code 1"):
        submit_all(runs, ["false"])


def test_base_judges_an_encoder_whose_path_yaml_would_cut() -> None:
    recipe = load_recipe("tiny", ['model.vision_encoder="run #1/encoder"'])
    (arm,) = make_arms(["base"], recipe, Depths(4, 6))
    judged = load_recipe("tiny", arm.overrides).vlm
    assert judged is not None
    assert judged.vision_encoder == "run #1/encoder"
