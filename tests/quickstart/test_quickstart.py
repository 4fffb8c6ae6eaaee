"""The whole main job in a few steps: scenes, base models, three stages on 2 ranks, export, questions, page."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
import transformers
from forked import CONTEXT, run_forked

from hive_ds.children import Programs, Submit
from hive_ds.cli import main
from hive_ds.data.scenes_samples import question_samples
from hive_ds.errors import Signalled
from hive_ds.quickstart import base_folders, pipeline
from hive_ds.quickstart.pipeline import RANKS, Quickstart
from hive_ds.quickstart.questions import QuestionResults
from hive_ds.quickstart.settings import RECIPE, SMOKE
from hive_ds.quickstart.steps import Step, run_steps, seconds_of
from hive_ds.recipe import load_recipe
from hive_ds.stages import HIVE_STAGES

pytest.importorskip("streaming", reason="needs mosaicml-streaming: pip install 'hive-ds[streaming]'")

from hive_ds.data.mds import write_mds


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of the stages: the first runs as it is. The others, and base models, in processes that begin at once."""
    commands: list[list[str]] = []

    class StandIn(Programs):
        def run(self, command: Sequence[str], env: Mapping[str, str], output: IO[str] | None = None) -> int:
            commands.append(list(command))
            if len(commands) == 1:
                return super().run(command, env, output)
            arguments = commands[-1][commands[-1].index("hive_ds.train") + 1 :]
            ended = run_forked("hive_ds.train:main", arguments, env, RANKS, timeout=240)
            print(ended.stdout, ended.stderr)
            return ended.returncode

    @contextmanager
    def pool(count: int, method: str, start: Callable[..., object], *arguments: object) -> Iterator[Submit]:
        with ProcessPoolExecutor(count, CONTEXT, start, arguments) as executor:
            yield executor.submit

    monkeypatch.setattr(pipeline, "Programs", StandIn)
    monkeypatch.setattr(base_folders, "process_pool", pool)
    return commands


@pytest.mark.timeout(900)
def test_quickstart_runs_whole_and_goes_on_where_it_was(
    tmp_path: Path, launched: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["quickstart", "--smoke", "--out", str(out)]
    assert main(command) == 0, capfd.readouterr()
    printed = capfd.readouterr().out
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port"]
    ranks = ["--num_accelerators", str(RANKS), "--module", "hive_ds.train"]
    assert [(each[:4], each[5:9]) for each in launched] == [(launcher, ranks)] * 3
    assert (out / "index.html").is_file()
    assert transformers.SiglipVisionModel.from_pretrained(out / "encoder").config.image_size == 64
    for number in (1, 2, 3):
        lines = [json.loads(line) for line in (out / f"stage{number}" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["event"] == "train"]
        assert len(losses) == 3
        (validation,) = [line for line in lines if line["event"] == "validation"]
        assert validation["loss"] > 0
        assert validation["text_loss"] > 0
    results = QuestionResults.load(out / "answers.json")
    assert len(results.answers) == len(results.shuffled_answers) == SMOKE.held_out
    assert f"{results.margin:+.1f} points" in printed
    assert "\nnext" not in printed  # of a stage: the next step does it
    page, chat, _ = printed.splitlines()[-3:]
    assert page == f"open {out / 'index.html'}, the page of results"
    assert main([*shlex.split(chat.partition(": hive-ds ")[2]), "--max-new-tokens", "2"]) == 0
    assert "answers questions" in capfd.readouterr().err  # the answer of a model that learned nothing may be empty

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(command) == 0
    assert capfd.readouterr().out.count("done before") == 8
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    assert main([*command, "--seed", "1"]) == 2
    assert capfd.readouterr().err.startswith(f"error: {out} was made with seed 0, not 1")


def test_a_step_that_failed_is_done_again_from_a_clean_start(tmp_path: Path) -> None:
    left, ran = tmp_path / "left", []

    def first() -> None:
        ran.append("first")

    def second() -> None:
        ran.append("second")
        assert not left.exists()
        left.mkdir()
        if ran.count("second") == 1:
            raise KeyboardInterrupt

    steps = [Step("first", "one", first), Step("the second", "two", second, (left,))]
    with pytest.raises(KeyboardInterrupt):
        run_steps(steps, tmp_path / "steps")
    run_steps(steps, tmp_path / "steps")
    run_steps(steps, tmp_path / "steps")
    assert ran == ["first", "second", "second"]
    assert left.is_dir()
    assert 0 <= seconds_of(tmp_path / "steps", "the second") < 60


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("quickstart --smoke", "data"),
        ("quickstart --smoke", "base/vision_encoder"),
        ("quickstart --smoke", "encoder"),
        ("compare --preset smoke", "data"),
    ],
)
def test_what_it_did_not_make_is_not_cleared_away(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / name / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert main([*command.split(), "--out", str(tmp_path)]) == 2
    settings = tmp_path / ("settings.json" if command.startswith("compare") else "quickstart.json")
    said = f"error: {mine.parent}: is there already, and {settings} is not: this command did not make it; "
    assert capsys.readouterr().err == f"{said}choose another --out, or move it away\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


@pytest.mark.parametrize("name", ["run", "run #1", "a: b", "[x]", "its ü"])
def test_a_stage_by_hand_is_that_of_the_quickstart(name: str, tmp_path: Path) -> None:
    """The shell and YAML read each path as it is."""
    out = tmp_path / name
    write_mds(question_samples(0, "questions", 1, 64), out / "data" / "questions")
    quickstart = Quickstart(out, 3, SMOKE)
    command = shlex.split(quickstart._next_steps()[-1][1])
    assert command == ["deepspeed", *quickstart._command(HIVE_STAGES[-1])]
    assert command[-2] == "--set"
    assert command[command.index("--stage") + 1] == "3"
    assert command[command.index("--run") + 1] == str(out)
    recipe = load_recipe(RECIPE, [value for word, value in pairwise(command) if word == "--set"])
    assert recipe.model.vision_encoder == str(out / "base" / "vision_encoder")
    assert recipe.model.language_model == recipe.vlm.language_model == str(out / "base" / "language_model")
    data = recipe.data
    assert [data.train, data.validation, data.text_validation] == [
        str(out / "data" / folder) for folder in ("train", "validation", "text_validation")
    ]
    assert recipe.training.seed == 3
    assert [recipe.stages[stage.name].steps for stage in HIVE_STAGES] == [3, 3, 3]


def test_sigterm_ends_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher, told to end, leaves its ranks."""
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\nsetsid sleep 1000 & echo $! > {tmp_path}/rank\nkill -TERM {os.getpid()}; wait\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(pipeline, "sys", SimpleNamespace(executable=str(launcher)))
    stage = Quickstart(tmp_path, 0, SMOKE).steps()[2]
    with pytest.raises(Signalled) as caught:
        stage.run()
    assert caught.value.exit_code == 143
    rank = Path("/proc", (tmp_path / "rank").read_text().strip(), "cmdline")
    assert not rank.exists() or not rank.read_text()  # empty: dead, and its parent has not asked yet
