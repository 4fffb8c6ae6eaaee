"""The page says what the results are, good or bad, and fetches nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from page_reader import Reader

from hive_ds.data.scenes_samples import question_samples
from hive_ds.evaluation.generation import truth
from hive_ds.plots import Line, line_plot, smoothed, ticks
from hive_ds.quickstart import questions
from hive_ds.quickstart.page import PICTURES_PER_KIND, PageContent, render_page
from hive_ds.quickstart.pipeline import chance
from hive_ds.quickstart.questions import QuestionResults, ask, table

SAMPLES = list(question_samples(0, "questions", 60, 64))
KINDS = [sample.meta["kind"] for sample in SAMPLES]
TRUTHS = [truth(sample) for sample in SAMPLES]


def results(right: int, shuffled_right: int) -> QuestionResults:
    """Of 60 answers the first ``right`` are right."""

    def answers(count: int) -> list[str]:
        return [text if index < count else "<b>nonsense</b>" for index, text in enumerate(TRUTHS)]

    return QuestionResults([s.id for s in SAMPLES], KINDS, TRUTHS, answers(right), answers(shuffled_right))


def content(results: QuestionResults) -> PageContent:
    lines = [{"event": "train", "step": step, "loss": 5 / step} for step in range(1, 30)]
    lines += [{"event": "train", "step": 30, "loss": None}]
    lines += [{"event": "validation", "step": 15, "loss": 0.6, "text_loss": 9.876}]
    lines += [{"event": "validation", "step": 30, "loss": 0.4, "text_loss": 1.234}]
    return PageContent(
        results=results,
        samples=SAMPLES,
        chance=chance(),
        stages=[("Stage 1: connector_pretraining", lines), ("Stage 2", [])],
        timings=[("scenes", 3.4), ("total", 3.4)],
        facts=["Seed 0; <5> scenes"],
        next_steps=[("Do this.", "hive-ds data convert <IN> OUT")],
    )


def test_page_is_whole_and_fetches_nothing() -> None:
    page = render_page(content(results(5, 0)))
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.counts["img"] == PICTURES_PER_KIND * 6
    assert reader.counts["svg"] == 1  # the second stage logged nothing
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert not re.search(r"https?://|<script|@import|url\(", page)
    assert 'name="viewport"' in page
    assert "<b>nonsense</b>" not in page
    assert "&lt;b&gt;nonsense" in page
    assert "Loss on text alone at its end: 1.234." in page
    assert page.count("<circle") == 1 + 2  # the legend's, and a dot a validation
    assert page.count('class="good"') == 5
    assert page.count(f'class="bad">&lt;b&gt;nonsense&lt;/b&gt;</span>, truth: {TRUTHS[5]}<') >= 1
    assert page.count('class="bad"') == reader.counts["img"] - 5
    assert "No values were logged." in page


@pytest.mark.parametrize(
    ("right", "shuffled", "says"),
    [(45, 15, "+50.0 points, it uses the picture"), (20, 18, "does not show"), (10, 40, "-50.0 points, this does not")],
)
def test_headline_follows_the_numbers(right: int, shuffled: int, says: str) -> None:
    page = render_page(content(results(right, shuffled)))
    assert says in page
    assert f"<b>{100 * right / 60:.1f} %</b> of 60" in page


def test_table_and_file(tmp_path: Path) -> None:
    mixed = results(45, 15)
    rows = table(mixed, chance())
    assert [row[0] for row in rows[1:]] == ["colour", "shape", "size", "count", "relation", "text", "all"]
    assert rows[-1] == ["all", "75 %", "63 to 84", "25 %", "16 to 37", "", "60"]
    assert rows[1][5] == "12 %"
    assert mixed.margin == 50
    mixed.save(tmp_path / "answers.json")
    assert QuestionResults.load(tmp_path / "answers.json") == mixed
    assert replace(mixed, shuffled_answers=mixed.answers).margin == 0


def test_answers_are_those_over_the_right_pictures_and_shuffled_ones_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model that says what the picture's own truth is, whatever it is asked."""
    seen = {sample.images: truth(sample) for sample in SAMPLES}
    monkeypatch.setattr(questions, "load_any", lambda folder: None)
    monkeypatch.setattr(questions.HiveProcessor, "from_pretrained", lambda folder: None)
    monkeypatch.setattr(questions, "answer_samples", lambda *of, **options: [seen[sample.images] for sample in of[2]])
    found = ask(Path("model"), SAMPLES, template="chat", seed=0, progress=lambda done, total: None)
    assert found.answers == found.truths == TRUTHS
    assert found.kinds == KINDS
    assert found.ids == [sample.id for sample in SAMPLES]
    assert sorted(found.shuffled_answers) == sorted(TRUTHS)
    assert found.margin > 50


def test_smoothing_is_a_mean_of_the_last_values() -> None:
    assert smoothed([(1, 4.0), (2, 2.0), (3, 0.0)], window=2) == [(1, 4.0), (2, 3.0), (3, 1.0)]
    assert smoothed([]) == []


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 6.3), (1, 400), (0.82, 0.83), (-2, 2), (5, 5), (0, 0), (1, 1e6), (3e-4, 7e-4)]
)
def test_ticks_are_few_round_and_cover(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    steps = {round(b - a, 9) for a, b in pairwise(found)}
    assert len(steps) == 1
    assert f"{steps.pop():e}"[0] in "125"


def test_plot_stays_inside_its_frame() -> None:
    svg = line_plot([Line("a", "red", [(1, 0.5), (7, 9.0)]), Line("b", "blue", [(7, -3.0)], markers=True)], "x", "y")
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    (line,) = root.iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    key, dot = root.iter("circle")  # what is drawn as dots has one in the legend
    assert key.attrib["fill"] == dot.attrib["fill"] == "blue"
    points.append((float(dot.attrib["cx"]), float(dot.attrib["cy"])))
    assert len(points) == 3
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert points[0][0] < points[1][0] == points[2][0]
    assert points[1][1] < points[0][1] < points[2][1]  # up is less
