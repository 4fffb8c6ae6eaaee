"""The comparison: scenes, base models, every arm with every seed through stages 1 to 5, judgement, page."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hive_ds.ablation.execute import run_all
from hive_ds.ablation.gather import Gathered, gather
from hive_ds.ablation.plan import ArmRun, make_plan
from hive_ds.compare.page import contrasts, render_page
from hive_ds.compare.settings import CompareSettings
from hive_ds.data.scenes_samples import SceneFolders
from hive_ds.files import write_whole
from hive_ds.quickstart.base_folders import draw_scenes, folder_overrides, make_base_models
from hive_ds.quickstart.settings import RECIPE
from hive_ds.quickstart.steps import Step, check_made_with, run_steps, seconds_of
from hive_ds.versions import made_with

SEED = 0
"""Of scenes and base models, the same under every seed of training."""
RESULTS = "results.json"


class Comparison:
    """The steps, and where each keeps its files below ``out``."""

    def __init__(self, out: Path, settings: CompareSettings) -> None:
        self.out, self.settings = out, settings
        self.folders = SceneFolders(out / "data")
        self.language_model = out / "base" / "language_model"
        self.vision_encoder = out / "base" / "vision_encoder"
        self.markers = out / "steps"

    def run(self) -> Path:
        """Do every step that ``out`` does not hold yet; returns the page.

        Raises:
            HiveError: ``out`` was made with other settings, or a run failed.
        """
        self._check_settings()
        run_steps(self.steps(), self.markers)
        return self.out / "index.html"

    def steps(self) -> list[Step]:
        """All steps, in order."""
        arms, seeds = self.settings.arms, self.settings.seeds
        bases = (self.language_model, self.vision_encoder)
        return [
            Step("scenes", "draw pictures with questions and answers", self._scenes, (self.folders.root,)),
            Step(
                "base models", "pretrain the LLM and the encoder that every arm starts from", self._base_models, bases
            ),
            Step("runs", f"train and judge {', '.join(arms)} with {len(seeds)} seeds", self._runs),
            Step("page", "write the page and the results", self._page),
        ]

    def _check_settings(self) -> None:
        check_made_with(self.out / "settings.json", asdict(self.settings), self.steps())

    def _scenes(self) -> None:
        draw_scenes(self.folders, self.settings.made, SEED)

    def _base_models(self) -> None:
        sizes = (self.settings.made.language_model, self.settings.made.vision_encoder)
        make_base_models(self.folders, self.language_model, self.vision_encoder, sizes, SEED)

    def _plan(self) -> list[ArmRun]:
        overrides = [
            *folder_overrides(self.folders, self.language_model, self.vision_encoder),
            "data.text_validation=null",
            *self.settings.made.overrides,
        ]
        return make_plan(RECIPE, overrides, self.settings.arms, self.settings.seeds, self.out / "runs")

    def _runs(self) -> None:
        judge = shlex.join([sys.executable, "-m", "hive_ds.compare.judge", "{run}", str(self.folders.root)])
        run_all(
            self._plan(),
            [sys.executable, "-m", "hive_ds.train"],
            after=judge,
            jobs=self.settings.jobs,
        )

    def _page(self) -> None:
        gathered = gather(self._plan())
        record = self._record(gathered)
        write_whole(self.out / RESULTS, json.dumps(record, indent=1) + "\n")
        write_whole(self.out / "index.html", render_page(gathered, record, held_out=self.settings.made.held_out))

    def _record(self, gathered: Gathered) -> dict[str, Any]:
        return {
            **gathered.as_dict(),
            "contrasts": [one.as_dict() for one in contrasts(gathered)],
            "seconds_by_step": {step.name: seconds_of(self.markers, step.name) for step in self.steps()[:-1]},
            "settings": asdict(self.settings),
            **made_with(),
        }
