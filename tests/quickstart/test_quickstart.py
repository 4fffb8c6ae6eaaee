"""The whole main job in a few steps: scenes, base models, three stages on 2 ranks, export, questions, page."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from hive_ds.cli import main
from hive_ds.quickstart.questions import QuestionResults
from hive_ds.quickstart.settings import SMOKE
from hive_ds.quickstart.steps import Step, run_steps, seconds_of

pytest.importorskip("streaming", reason="needs mosaicml-streaming: pip install 'hive-ds[streaming]'")


@pytest.mark.timeout(900)
def test_quickstart_runs_whole_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    command = ["quickstart", "--smoke", "--out", str(out)]
    program = str(Path(sys.executable).with_name("hive-ds"))
    first = subprocess.run([program, *command], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
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
    assert f"{results.margin:+.1f} points" in first.stdout
    assert "\nnext" not in first.stdout  # of a stage: the next step does it
    page, chat, _ = first.stdout.splitlines()[-3:]
    assert page == f"open {out / 'index.html'}, the page of results"
    answered = subprocess.run(
        [program, *shlex.split(chat.partition(": hive-ds ")[2]), "--max-new-tokens", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answered.returncode == 0, answered.stderr
    assert "answers questions" in answered.stderr  # the answer of a model that learned nothing may be empty

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(command) == 0
    assert capsys.readouterr().out.count("done before") == 8
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    assert main([*command, "--seed", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} was made with seed 0, not 1")


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
    assert seconds_of(tmp_path / "steps", "the second") >= 0
