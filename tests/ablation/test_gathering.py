"""What is gathered of an ablation: which runs count, their scores, the table, the differences that can be told."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from hive_ds.ablation.contrast import Contrast
from hive_ds.ablation.gather import Gathered, gather
from hive_ds.ablation.plan import read_plan
from hive_ds.errors import HiveError


def test_the_difference_that_could_be_told_is_found_in_four_cases_of_five() -> None:
    """Drawn: differences of that size over few seeds, tested as `ttest_rel` would."""
    drawn = np.random.default_rng(0).standard_normal((200_000, 3))
    for seeds in (2, 3):
        rows = drawn[:, :seeds]
        one = Contrast("score", "hive", "base", tuple(rows[0].tolist()))
        # In units of the true error of the mean, which `detectable` takes from the seeds' own spread.
        shift = one.detectable / stdev(one.differences)
        found = ttest_1samp(rows + shift, 0, axis=1)
        assert ((found.pvalue < 0.05) & (found.statistic > 0)).mean() == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ablation.json", '[{"arm": "hive"}]', "ablation.json: KeyError: 'seed'; expected what hive-ds ablate writes"),
        ("hive-seed0/scores.json", "[1]", "scores.json: AttributeError: .*; expected an object of names and numbers"),
        ("hive-seed0/scores.json", '{"probe": null}', "scores.json: TypeError: .*; expected an object of names and"),
        ("hive-seed0/eval/results.json", "{", "results.json: Expecting .*; expected what hive-ds eval writes"),
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    plan = [{"arm": "hive", "seed": 0, "folder": "hive-seed0", "stages": [1]}]
    for path, content in (("ablation.json", json.dumps(plan)), ("hive-seed0/stage1/DONE", ""), (file, text)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    with pytest.raises(HiveError, match=message):
        gather(read_plan(tmp_path))


def test_a_run_counts_once_all_its_stages_are_finished(tmp_path: Path) -> None:
    """Its scores are the last of each stage; a CPU run of an older version has logged no memory."""
    plan = [{"arm": "hive", "seed": 0, "folder": "hive-seed0", "stages": [1, 2]}]
    start = {"event": "start", "step": 0, "ranks": 2, "device": "CPU", "matmul_flops_per_second": 1e12}
    step = {"event": "train", "step": 5, "samples": 20, "loss": 1.0, "seconds_per_step": 2.0, "mfu": 0.5}
    losses = [{"event": "validation", "step": step, "loss": 9.0 / step, "text_loss": 2.5} for step in (3, 5)]
    (tmp_path / "hive-seed0" / "stage1").mkdir(parents=True)
    (tmp_path / "hive-seed0" / "stage2").mkdir()
    (tmp_path / "ablation.json").write_text(json.dumps(plan))
    lines = "".join(json.dumps(line) + "\n" for line in (start, step, *losses))
    (tmp_path / "hive-seed0" / "stage1" / "metrics.jsonl").write_text(lines)
    for number, missing in ((1, ("hive-seed0",)), (2, ())):
        (tmp_path / "hive-seed0" / f"stage{number}" / "DONE").touch()
        assert gather(read_plan(tmp_path)).missing == missing
    scores = {"loss": 1.8, "text_loss": 2.5, "seconds": 10.0, "TFLOPs": 10.0, "GB": 0.0}
    expected = {f"stage 1 {name}": value for name, value in scores.items()}
    assert gather(read_plan(tmp_path)).scores == {"hive": {0: expected}}


def test_the_table_says_how_many_seeds_each_arm_and_score_has() -> None:
    hive = {0: {"loss": 1.0, "probe": 0.5}, 1: {"loss": 2.0}, 2: {"loss": 3.0}}
    gathered = Gathered({"hive": hive, "sa": {0: {"loss": 4.0}}}, ())
    assert gathered.table() == [["score", "hive (3)", "sa (1)"], ["loss", "2 ± 1", "4"], ["probe", "0.5", ""]]
    summary = gathered.as_dict()["summary"]["hive"]
    assert summary == {
        "loss": {"mean": 2.0, "std": 1.0, "seeds": 3},
        "probe": {"mean": 0.5, "std": None, "seeds": 1},
    }
