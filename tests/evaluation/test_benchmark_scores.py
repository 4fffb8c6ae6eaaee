"""Scores and their errors against other implementations, and where two readings of an answer part."""

from __future__ import annotations

import math
import random
from statistics import stdev
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; make venv installs it")

from lmms_eval.tasks.mme import utils as mme
from lmms_eval.tasks.pope import utils as pope
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from hive_ds.evaluation.benchmarks.catalogue import BENCHMARKS, TASKS, named, read_task, write_task
from hive_ds.evaluation.benchmarks.readings import MME_COGNITION, MME_PERCEPTION, mme_says, pope_says_yes
from hive_ds.evaluation.benchmarks.report import summary, table
from hive_ds.evaluation.benchmarks.runner import Outcome
from hive_ds.evaluation.benchmarks.scores import POPE_METRICS, Answered, Score, ratio, scores
from hive_ds.evaluation.scoring import Z_95

YES_OR_NO = ("Yes", "yes", "NO", "no", " No ", "yes ")
OTHER_FORMS = ("Yes.", "No.", "yes, it is", "There is no dog", "It is not", "maybe", "", "Yes. No doubt", "y", "n")


def mme_rows(answers: tuple[str, ...], seed: int) -> list[Answered]:
    draw = random.Random(seed)
    rows = []
    for category in (*MME_PERCEPTION, *MME_COGNITION):
        for image in range(3):
            for label in ("Yes", "No"):
                labels = {"question_id": f"{category}/{image}", "answer": label, "category": category}
                answer = draw.choice(answers)
                rows.append(Answered(labels, answer, mme.mme_process_results(labels, [answer.strip()])))
    draw.shuffle(rows)
    return rows


def pope_rows(answers: tuple[str, ...], seed: int) -> list[Answered]:
    draw = random.Random(seed)
    rows = []
    for number in range(60):
        category, label = ("random", "popular", "adversarial")[number % 3], draw.choice(("yes", "no"))
        labels = {"question_id": str(number), "answer": label, "image_source": f"i{number // 6}", "category": category}
        answer = draw.choice(answers)
        rows.append(Answered(labels, answer, pope.pope_process_results(labels, [answer.strip()])))
    return rows


def theirs(rows: list[Answered], aggregations: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's own figures of the rows."""
    return {
        name: aggregate([row.metrics[name] for row in rows if name in row.metrics])
        for name, aggregate in aggregations.items()
    }


MME_THEIRS = dict.fromkeys(("mme_perception_score", "mme_cognition_score"), mme.mme_aggregate_results)
POPE_THEIRS = {
    "pope_accuracy": pope.pope_aggregate_accuracy,
    "pope_precision": pope.pope_aggregate_precision,
    "pope_recall": pope.pope_aggregate_recall,
    "pope_f1_score": pope.pope_aggregate_f1_score,
    "pope_yes_ratio": pope.pope_aggregate_yes_ratio,
}


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_lmms_eval_where_the_readings_agree(seed: int) -> None:
    rows = mme_rows((*YES_OR_NO, "Yes.", "no, it is not", "maybe", ""), seed)
    found = {score.name: score for score in scores(BENCHMARKS["mme"], rows, theirs(rows, MME_THEIRS))}
    for name, most in (("perception", 2000), ("cognition", 800)):
        assert found[name].value == pytest.approx(found[name].lmms_eval)
        assert 0 < found[name].value < found[name].maximum == most
        parts = [score for part, score in found.items() if part.startswith(f"{name}.")]
        assert found[name].value == pytest.approx(sum(part.value for part in parts))
        assert all(part.maximum == 200 for part in parts)
    rows = pope_rows(tuple(answer for answer in YES_OR_NO if answer != "NO"), seed)
    own = theirs(rows, POPE_THEIRS)
    found = {score.name: score for score in scores(BENCHMARKS["pope"], rows, own)}
    for name in ("accuracy", "precision", "recall", "f1"):
        assert found[name].value == pytest.approx(own[POPE_METRICS[name]])
    assert found["yes_ratio"].lmms_eval == sum(row.labels["answer"] == "yes" for row in rows) / 60
    assert found["yes_ratio"].value == sum(row.answer.strip().lower() == "yes" for row in rows) / 60


@pytest.mark.parametrize("seed", range(5))
def test_popes_own_reading(seed: int) -> None:
    """By scikit-learn over what the rule of its authors makes of the answers; lmms-eval's figures lie beside it."""
    read = dict(zip(OTHER_FORMS, (1, 0, 1, 0, 0, 1, 1, 1, 1, 1), strict=True)) | dict.fromkeys(
        ("Yes", "yes", "yes "), 1
    )
    rows = pope_rows((*OTHER_FORMS, "Yes", "yes"), seed)
    said = [read[row.answer] for row in rows]
    true = [int(row.labels["answer"] == "yes") for row in rows]
    own = theirs(rows, POPE_THEIRS)
    found = {score.name: score for score in scores(BENCHMARKS["pope"], rows, own)}
    assert found["accuracy"].value == pytest.approx(accuracy_score(true, said))
    assert found["precision"].value == pytest.approx(precision_score(true, said))
    assert found["recall"].value == pytest.approx(recall_score(true, said))
    assert found["f1"].value == pytest.approx(f1_score(true, said))
    assert found["yes_ratio"].value == sum(said) / len(said)
    assert {name: found[name].lmms_eval for name in POPE_METRICS} == {n: own[POPE_METRICS[n]] for n in POPE_METRICS}
    assert found["accuracy"].value != own["pope_accuracy"]
    for category in ("random", "popular", "adversarial"):
        chosen = [index for index, row in enumerate(rows) if row.labels["category"] == category]
        part = f1_score([true[index] for index in chosen], [said[index] for index in chosen])
        assert found[f"{category}.f1"].value == pytest.approx(part)


def test_yes_with_a_full_stop_is_yes_to_the_authors_alone() -> None:
    rows = pope_rows(("Yes.",), 0)
    found = {score.name: score for score in scores(BENCHMARKS["pope"], rows, theirs(rows, POPE_THEIRS))}
    assert (found["recall"].value, found["yes_ratio"].value) == (1, 1)
    assert (found["accuracy"].lmms_eval, found["recall"].lmms_eval) == (0, 0)
    assert not pope_says_yes("No, there is a dog")
    assert pope_says_yes("NO")  # their rule knows no such word
    assert pope_says_yes("Nothing like it")  # a word, not a part of one


def test_single_letters_are_answers_to_lmms_eval_alone() -> None:
    rows = mme_rows(("y",), 0)
    own = theirs(rows, MME_THEIRS)
    found = {score.name: score for score in scores(BENCHMARKS["mme"], rows, own)}
    assert (found["perception"].value, own["mme_perception_score"]) == (0, 500)
    assert [mme_says(answer) for answer in ("Yes", "NO.", "the yes", "  no", "y")] == [
        "yes",
        "no",
        "other",
        "no",
        "other",
    ]


def test_standard_errors() -> None:
    draw = random.Random(0)
    values = [draw.random() for _ in range(50)]
    mean = sum(values) / 50
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 49)
    assert ratio(values, [1.0] * 50, range(50)) == pytest.approx((mean, 1.0, deviation / math.sqrt(50)))
    # every image asked about three times with the same outcome: as few observations as images
    thrice = [value for value in values for _ in range(3)]
    images = [index // 3 for index in range(150)]
    assert ratio(thrice, [1.0] * 150, images) == pytest.approx((mean, 1.0, deviation / math.sqrt(50)))
    assert ratio([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], "abc")[0] == 0.5
    assert ratio([0.0], [0.0], "a") == (0.0, 1.0, None)
    assert ratio([1.0, 1.0], [1.0, 1.0], "aa") == (1.0, 1.0, None)
    score = Score("accuracy", 0.95, 1.0, 0.1)
    assert score.interval == (pytest.approx(0.95 - Z_95 * 0.1), 1.0)
    assert Score("accuracy", 1.0, 1.0, 0.0).interval is Score("accuracy", 1.0, 1.0, None).interval is None


@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_the_truth(seed: int) -> None:
    """F1 of clustered answers: about 95 of 100 intervals over fresh draws hold the value of a very large draw."""
    draw = random.Random(seed)

    def sample(images: int) -> tuple[list[float], list[float], list[int]]:
        twice, either, clusters = [], [], []
        for image in range(images):
            skill = draw.choice((0.6, 0.95))
            for _ in range(4):
                true = draw.random() < 0.5
                said = true if draw.random() < skill else not true
                twice.append(2.0 * (true and said))
                either.append(float(true) + float(said))
                clusters.append(image)
        return twice, either, clusters

    truth, _, _ = ratio(*sample(20000))
    held = 0
    for _ in range(200):
        value, most, error = ratio(*sample(60))
        low, high = Score("f1", value, most, error).interval or (1, 0)
        held += low <= truth <= high
    assert 0.90 <= held / 200 <= 0.99


def test_task_files(tmp_path) -> None:
    assert {path.stem for path in TASKS.glob("*.yaml")} == set(BENCHMARKS)
    for name, benchmark in BENCHMARKS.items():
        task = read_task(benchmark)
        assert task["task"] == f"hive_{name}"
        assert task["dataset_path"] == "parquet"
        assert task["generation_kwargs"]["max_new_tokens"] <= 128
        write_task(task, tmp_path / "task.yaml")
        assert (tmp_path / "task.yaml").read_text().count("!function") == (TASKS / f"{name}.yaml").read_text().count(
            "!function"
        )
    assert [one.name for one in named(["pope", "mme", "pope"])] == ["pope", "mme"]


def test_the_error_of_mme_is_that_of_a_sum_of_categories() -> None:
    """Images are independent, and so are categories: 200, 50 and 0 points for both, one and no question right."""
    points = {"existence": (200, 50, 0), "count": (200, 200, 0)}
    rows = [
        Answered({"question_id": f"{image}", "answer": "Yes", "category": category}, said, {})
        for category, images in points.items()
        for image, value in enumerate(images)
        for said in {200: ("yes", "yes"), 50: ("yes", "no"), 0: ("no", "no")}[value]
    ]
    errors = {category: stdev(images) / math.sqrt(3) for category, images in points.items()}
    found = {score.name: score for score in scores(BENCHMARKS["mme"], rows, {})}
    assert {name: found[f"perception.{name}"].standard_error for name in points} == pytest.approx(errors)
    whole = found["perception"]
    assert (whole.value, whole.maximum) == (pytest.approx(250 / 3 + 400 / 3), 400)
    assert whole.standard_error == pytest.approx(math.hypot(*errors.values()))


def test_the_table_and_the_summary_hold_the_main_scores() -> None:
    """Shares in percent, sums as they are; one standard error; how many of the questions were asked."""
    rows = [Answered({}, "", {})] * 2
    parts = [Score("accuracy", 0.5, 1.0, 0.25, 0.4), Score("random.accuracy", 0.75, 1.0, None)]
    sums = [Score("perception", 1300.5, 2000, 12.5, 1250.0)]
    outcomes = [
        Outcome(BENCHMARKS["pope"], "pope-1", "test", 9000, rows, parts, {}),
        Outcome(BENCHMARKS["mme"], "mme-1", "test", 2, rows, sums, {}),
    ]
    lines = table(outcomes).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == [
        ["pope", "accuracy", "50.00 ± 25.00", "100", "40.00", "2 of 9000", "pope-1"],
        ["mme", "perception", "1300.50 ± 12.50", "2000", "1250.00", "2", "mme-1"],
    ]
    record = {"weights_sha256": "w", "vision_encoder_sha256": "v", "versions": {"lmms-eval": "0"}}
    assert summary(outcomes, record)["scores"] == {
        "pope-1 (pope, test, 2 questions)": {"accuracy": 0.5},
        "mme-1 (mme, test, 2 questions)": {"perception": 1300.5},
    }
