"""One HTML page of a quickstart's results, with nothing to fetch: pictures and curves are inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hive_ds.data.schema import Sample
from hive_ds.evaluation.scoring import exact_match
from hive_ds.events import series
from hive_ds.page import document, picture
from hive_ds.page import table as page_table
from hive_ds.plots import Line, line_plot, smoothed
from hive_ds.quickstart.questions import QuestionResults, table

PICTURES_PER_KIND = 3


@dataclass(frozen=True)
class PageContent:
    """Everything on the page."""

    results: QuestionResults
    samples: Sequence[Sample]
    """Those that were asked, in the order of ``results``."""
    chance: dict[str, float]
    stages: Sequence[tuple[str, list[dict]]]
    """Name of each, and the lines of its metrics.jsonl."""
    timings: Sequence[tuple[str, float]]
    """Name and seconds of every step."""
    facts: Sequence[str]
    """Sentences on what was run: sizes, samples, seed."""
    next_steps: Sequence[tuple[str, str]]
    """What one may do next, and the command."""


def render_page(content: PageContent) -> str:
    """The page as HTML."""
    sections = [
        "<h1>HIVE quickstart</h1>",
        headline(content.results),
        "<h2>Answers to held-out questions</h2>",
        page_table(table(content.results, content.chance)),
        '<p class="faint">Shuffled: the same model and questions, each question over another sample\'s picture. '
        "Intervals are Wilson's, 95 %. A blind guess takes one of the kind's answers, all equally frequent.</p>",
        "<h2>Loss of the three stages</h2>",
        *(_curves(name, lines) for name, lines in content.stages),
        "<h2>Pictures, questions, answers</h2>",
        f'<p class="faint">The first {PICTURES_PER_KIND} of every kind, not chosen.</p>',
        _pictures(content),
        "<h2>What was run</h2>",
        "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in content.facts) + "</ul>",
        page_table([["step", "seconds"], *([name, f"{seconds:.0f}"] for name, seconds in content.timings)]),
        "<h2>What to do next</h2>",
        *(f"<p>{escape(what)}</p><pre>{escape(command)}</pre>" for what, command in content.next_steps),
    ]
    return document("HIVE quickstart", sections)


def headline(results: QuestionResults) -> str:
    """One sentence with the result, whatever it is."""
    right, shuffled = results.accuracy["all"], results.shuffled_accuracy["all"]
    verdict = "it uses the picture" if right.interval[0] > shuffled.interval[1] else "this does not show that it looks"
    return (
        f'<p class="headline">The model answers <b>{100 * right.value:.1f} %</b> of {right.total} held-out questions '
        f"with the right picture and <b>{100 * shuffled.value:.1f} %</b> with another one: "
        f"{results.margin:+.1f} points, {verdict}.</p>"
    )


def _curves(stage: str, lines: list[dict]) -> str:
    train = Line("training", "var(--one)", smoothed(series(lines, "train", "loss")))
    held_out = Line("held out", "var(--two)", series(lines, "validation", "loss"), markers=True)
    forgetting = series(lines, "validation", "text_loss")
    note = f" Loss on text alone at its end: {forgetting[-1][1]:.3f}." if forgetting else ""
    return (
        f"<h3>{escape(stage)}</h3>{line_plot([train, held_out], 'step', 'loss (nats per token)')}"
        f'<p class="faint">Training loss is a running mean over 5 steps.{note}</p>'
    )


def _pictures(content: PageContent) -> str:
    shown: dict[str, int] = {}
    figures = []
    for sample, kind, answer, truth in zip(
        content.samples, content.results.kinds, content.results.answers, content.results.truths, strict=True
    ):
        shown[kind] = shown.get(kind, 0) + 1
        if shown[kind] <= PICTURES_PER_KIND:
            figures.append(_figure(sample, answer, truth))
    return '<div class="grid">' + "".join(figures) + "</div>"


def _figure(sample: Sample, answer: str, truth: str) -> str:
    question = sample.turns[-2].content.replace("<image>", "").strip()
    if exact_match(answer, truth):
        said = f'<span class="good">{escape(answer)}</span>'
    else:
        said = f'<span class="bad">{escape(answer or "(nothing)")}</span>, truth: {escape(truth)}'
    return (
        f"<figure>{picture(sample.images[0], 'png', 'a generated scene')}"
        f"<figcaption>{escape(question)}<br>{said}</figcaption></figure>"
    )
