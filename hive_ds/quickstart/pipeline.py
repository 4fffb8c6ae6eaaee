"""The main job at toy size: scenes, base models, three stages, export, questions, page."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from hive_ds.children import Programs
from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.scenes import ANSWERS
from hive_ds.data.scenes_samples import SceneFolders
from hive_ds.errors import HiveError
from hive_ds.events import read_events
from hive_ds.export import export_encoder
from hive_ds.quickstart.base_folders import draw_scenes, folder_overrides, make_base_models, read_samples
from hive_ds.quickstart.page import PageContent, render_page
from hive_ds.quickstart.questions import QuestionResults, ask, table
from hive_ds.quickstart.settings import DEFAULT, RECIPE, Settings
from hive_ds.quickstart.steps import Step, check_made_with, run_steps, seconds_of
from hive_ds.recipe import load_recipe, override
from hive_ds.stages import HIVE_STAGES, Stage
from hive_ds.training.distributed import uses_gpu

RANKS = 2


def run_quickstart(out: str | Path, *, seed: int = 0, settings: Settings = DEFAULT) -> QuestionResults:
    """Run every step that ``out`` does not hold yet; print and return the result.

    Raises:
        HiveError: ``out`` was made with another seed or other settings, or a training stage failed.
    """
    quickstart = Quickstart(Path(out), seed, settings)
    quickstart.check_settings()
    run_steps(quickstart.steps(), quickstart.markers)
    results = QuestionResults.load(quickstart.answers)
    print(_as_text(table(results, chance())))
    print(f"\nright images over shuffled ones: {results.margin:+.1f} points")
    print("\n".join(["", *quickstart.what_next()]))
    return results


def chance() -> dict[str, float]:
    """Share of right answers of a blind guess, by kind of question."""
    return {kind: 1 / len(answers) for kind, answers in ANSWERS.items()}


class Quickstart:
    """The steps, and where each keeps its files below ``out``."""

    def __init__(self, out: Path, seed: int, settings: Settings) -> None:
        self.out, self.seed, self.settings = out, seed, settings
        self.folders = SceneFolders(out / "data")
        self.language_model = out / "base" / "language_model"
        self.vision_encoder = out / "base" / "vision_encoder"
        self.encoder = out / "encoder"
        self.answers = out / "answers.json"
        self.page = out / "index.html"
        self.picture = out / "picture.png"
        self.markers = out / "steps"

    def steps(self) -> list[Step]:
        """All steps, in order."""
        return [
            Step("scenes", "draw pictures with questions and answers", self._scenes, (self.folders.root,)),
            Step(
                "base models",
                "pretrain an LLM on text alone and an encoder on captioned pictures",
                self._base_models,
                (self.language_model, self.vision_encoder),
            ),
            *(Step(f"stage {stage.number}", stage.name, partial(self._train, stage)) for stage in HIVE_STAGES),
            Step("export", "write the encoder as a stock folder", self._export, (self.encoder,)),
            Step("questions", "ask about held-out pictures, right and shuffled", self._questions),
            Step("page", "write the page of results", self._page),
        ]

    def check_settings(self) -> None:
        """Write the settings to a new folder; compare them with those of an old one."""
        check_made_with(self.out / "quickstart.json", {"seed": self.seed, **asdict(self.settings)}, self.steps())

    def what_next(self) -> list[str]:
        """Lines for the end: the page, a question about a picture, and a run of one's own."""
        if not self.picture.is_file():
            self.picture.write_bytes(read_samples(self.folders.questions)[0].images[0])
        return [
            f"open {self.page.resolve()}, the page of results",
            f"ask it about a picture: {self._chat()}",
            "train on your own encoder, LLM and pictures: docs/tutorial.md",
        ]

    def _chat(self) -> str:
        """The command that asks about a held-out picture."""
        question = read_samples(self.folders.questions)[0].turns[0].content.replace(IMAGE_TOKEN, "").strip()
        return shlex.join(["hive-ds", "chat", str(self.out), "--image", str(self.picture), question])

    def _scenes(self) -> None:
        draw_scenes(self.folders, self.settings, self.seed, progress=_bar("samples"))

    def _base_models(self) -> None:
        sizes = (self.settings.language_model, self.settings.vision_encoder)
        make_base_models(self.folders, self.language_model, self.vision_encoder, sizes, self.seed)

    def _train(self, stage: Stage) -> None:
        command = self._command(stage)
        print(shlex.join(["deepspeed", *command]), flush=True)
        command.append("--no-next")  # the next step does it
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(_free_port())]
        with Programs() as programs:
            code = programs.run([*launcher, *command], _environment())
        if code:
            raise HiveError(
                f"stage {stage.number} ended with exit code {code}, its messages are above; "
                "run the quickstart again to go on from here"
            )

    def _command(self, stage: Stage) -> list[str]:
        """Arguments of the ``deepspeed`` launcher."""
        overrides = [
            *folder_overrides(self.folders, self.language_model, self.vision_encoder),
            override("data.text_validation", self.folders.text_validation),
            f"training.seed={self.seed}",
            f"data.num_workers={int(_threads() > 1)}",  # a loader process where a rank has a core to spare
            *self.settings.overrides,
        ]
        command = ["--num_accelerators", str(_ranks()), "--module", "hive_ds.train"]
        command += ["--recipe", RECIPE, "--stage", str(stage.number), "--run", str(self.out)]
        return command + [part for override in overrides for part in ("--set", override)]

    def _export(self) -> None:
        report = export_encoder(self.out, self.encoder)
        print(f"{report.folder}: {report.model_class}, features equal to {report.largest_difference:.1e}")

    def _questions(self) -> None:
        results = ask(
            self.out / f"stage{HIVE_STAGES[-1].number}" / "model",
            read_samples(self.folders.questions),
            template=load_recipe(RECIPE).data.template,
            seed=self.seed,
            progress=_bar("answers"),
        )
        results.save(self.answers)

    def _page(self) -> None:
        timings = [(step.name, seconds_of(self.markers, step.name)) for step in self.steps()[:-1]]
        timings.append(("total", sum(seconds for _, seconds in timings)))
        content = PageContent(
            results=QuestionResults.load(self.answers),
            samples=read_samples(self.folders.questions),
            chance=chance(),
            stages=[
                (f"Stage {s.number}: {s.name}", read_events(self.out / f"stage{s.number}" / "metrics.jsonl"))
                for s in HIVE_STAGES
            ],
            timings=timings,
            facts=self._facts(),
            next_steps=self._next_steps(),
        )
        self.page.write_text(render_page(content))

    def _facts(self) -> list[str]:
        settings, recipe = self.settings, load_recipe(RECIPE, self.settings.overrides)
        assert recipe.model.routes is not None
        llm, vision = settings.language_model, settings.vision_encoder
        stages = ", ".join(
            f"{one.name} {recipe.stages[one.name].steps} steps of {recipe.stages[one.name].global_batch_size}"
            for one in HIVE_STAGES
        )
        return [
            f"Seed {self.seed}; {settings.scenes} training scenes of {settings.image_size} x {settings.image_size} "
            f"pixels, {settings.held_out} held-out questions.",
            f"Language model: {llm.layers} layers, {llm.width} wide, pretrained {llm.steps} steps of {llm.batch} on "
            f"text alone ({settings.text} conversations about scenes that are told, not shown).",
            f"Vision encoder: {vision.blocks} blocks, {vision.width} wide, pretrained {vision.steps} steps of "
            f"{vision.batch} with the sigmoid contrastive loss ({settings.captions} captioned pictures of one shape).",
            f"Routes: vision blocks {list(recipe.model.routes.vision_blocks)} to language layers "
            f"{list(recipe.model.routes.language_layers)}.",
            f"Stages: {stages}; {_ranks()} ZeRO ranks, policy {recipe.training.ds_config}.",
        ]

    def _next_steps(self) -> list[tuple[str, str]]:
        stage = HIVE_STAGES[-1]
        return [
            ("Ask the model about a picture.", self._chat()),
            (
                "Use the trained encoder in plain transformers.",
                "from transformers import SiglipVisionModel\n"
                f'encoder = SiglipVisionModel.from_pretrained("{self.encoder}")',
            ),
            ("Change a value and train on your own (every value and its origin):", f"hive-ds recipe show {RECIPE}"),
            (
                "Bring your own pictures: LLaVA-format JSON and an image folder.",
                "hive-ds data convert DATA.json OUT --images IMAGES",
            ),
            ("Run one stage by hand, as on a cluster.", shlex.join(["deepspeed", *self._command(stage)])),
        ]


def _ranks() -> int:
    return min(RANKS, torch.cuda.device_count()) if uses_gpu() else RANKS


def _threads() -> int:
    """Cores of a rank."""
    return max(1, (os.cpu_count() or 1) // _ranks())


def _environment() -> dict[str, str]:
    """Of the launcher: programs beside this Python (ninja) are found, and ranks share the cores."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": str(_threads())}
    return environment if uses_gpu() else {**environment, "DS_ACCELERATOR": "cpu"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _bar(unit: str) -> Callable[[int, int], None]:
    bar = tqdm(unit=f" {unit}", dynamic_ncols=True)

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return update


def _as_text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
