"""What is written of probes: a results file, a table in the terminal, and a page with accuracy by block."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hive_ds import __version__
from hive_ds.evaluation.probes.data import LabelledImages, ProbeData
from hive_ds.evaluation.probes.encoder import EncoderInfo
from hive_ds.evaluation.probes.results import BlockResult, best_block
from hive_ds.evaluation.probes.settings import ProbeSettings
from hive_ds.files import must_write, write_whole
from hive_ds.launch.probe import version
from hive_ds.page import document
from hive_ds.page import table as page_table
from hive_ds.plots import COLOURS, Line, line_plot

RESULTS, PAGE = "probes.json", "probes.html"
PACKAGES = ("torch", "transformers", "torchvision", "pillow", "numpy", "scipy", "datasets")
CONVERGED = 1e-3
"""Largest gradient of a linear fit that is taken for its optimum."""
NOTE = (
    "Accuracy on the test images in percent, mean ± standard deviation over seeds; without ± where no seed could change"
    " it. The best block of an encoder is picked on the same test images, so it reads a little too high."
)


@dataclass(frozen=True)
class ProbeReport:
    """Results of one head for several encoders on one data set."""

    data: ProbeData
    settings: ProbeSettings
    encoders: Sequence[EncoderInfo]
    results: Sequence[BlockResult]

    def as_dict(self) -> dict[str, Any]:
        """The results file: everything that identifies the figures, then the figures."""
        test = self.data.test
        return {
            "format": 1,
            "head": {"name": self.settings.head_name, **asdict(self.settings.head)},
            "blocks": self.settings.blocks,
            "seeds": self.settings.seeds,
            "data": {
                "name": self.data.name,
                "train": _describe(self.data.train),
                "test": {"held_out_share": self.data.test_share} if test is None else _describe(test),
            },
            "encoders": [asdict(encoder) for encoder in self.encoders],
            "versions": _versions(),
            "best": [self._best(name, task).as_dict() for task in self.tasks for name in self.names],
            "results": [result.as_dict() for result in self.results],
        }

    @property
    def names(self) -> list[str]:
        """Encoders in the order they were given."""
        return [encoder.name for encoder in self.encoders]

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the data."""
        return list(dict.fromkeys(result.task for result in self.results))

    def rows(self, task: str) -> list[list[str]]:
        """A table of ``task``: a head, a row a block, and what the best is where there are several."""
        cells = {(one.encoder, one.block): str(one) for one in self.results if one.task == task}
        blocks = sorted({block for _, block in cells})
        rows = [["block", *self.names]]
        rows += [[str(block), *(cells.get((name, block), "") for name in self.names)] for block in blocks]
        if len(blocks) > 1:
            rows.append(["best", *(f"block {self._best(name, task).block}" for name in self.names)])
        return rows

    def print(self) -> None:
        """Print one table a task."""
        console = Console(width=None if Console().is_terminal else 140)
        for task in self.tasks:
            head, *body = self.rows(task)
            console.print(self._title(task))
            table = Table()
            for column in head:
                table.add_column(column, justify="right", no_wrap=True)
            for row in body:
                table.add_row(*row, end_section=row is body[-2 if len(body) > 1 else -1])
            console.print(table)
        if poor := self._unconverged():
            console.print(f"{poor} linear fits ended with a gradient above {CONVERGED:g}: they may read too low")

    def write(self, out: str | Path) -> None:
        """Write `RESULTS` and `PAGE` to the folder ``out``; HiveError where it cannot be written."""
        out = Path(out)
        with must_write(out, "expected a folder for results"):
            write_whole(out / RESULTS, json.dumps(self.as_dict(), indent=2) + "\n")
            write_whole(out / PAGE, self._page())

    def _best(self, encoder: str, task: str) -> BlockResult:
        return best_block(self.results, encoder, task)

    def _unconverged(self) -> int:
        return sum(score.fit.get("gradient", 0) > CONVERGED for one in self.results for score in one.scores)

    def _title(self, task: str) -> str:
        one = next(result for result in self.results if result.task == task)
        sizes = f"{one.num_classes} classes, {one.train_size} training and {one.test_size} test images"
        return f"{self.data.name}, {task}: {self.settings.head_name} probe, {sizes}"

    def _page(self) -> str:
        sections = [f"<h1>Probes of frozen encoders on {escape(self.data.name)}</h1>", f'<p class="faint">{NOTE}</p>']
        for task in self.tasks:
            lines = [
                Line(name, COLOURS[place % len(COLOURS)], self._series(name, task))
                for place, name in enumerate(self.names)
            ]
            sections.append(f"<h2>{escape(self._title(task))}</h2>")
            if len({result.block for result in self.results}) > 1:
                sections.append(line_plot(lines, "block", "accuracy in percent"))
            sections.append(page_table(self.rows(task)))
        rows = [["encoder", "class", "blocks", "sha256 of the weights"]]
        rows += [[one.name, one.model_class, str(one.num_blocks), one.weights_sha256] for one in self.encoders]
        return document("Probes", [*sections, "<h2>Encoders</h2>", page_table(rows)])

    def _series(self, encoder: str, task: str) -> list[tuple[float, float]]:
        return [(one.block, 100 * one.accuracy) for one in self.results if (one.encoder, one.task) == (encoder, task)]


def _describe(images: LabelledImages) -> dict[str, Any]:
    return {"name": images.name, "size": images.size, "fingerprint": images.fingerprint}


def _versions() -> dict[str, str]:
    installed = {package: found for package in PACKAGES if (found := version(package)) is not None}
    return {"hive_ds": __version__, "python": platform.python_version(), **installed}
