"""What `hive_ds.train` says of its command line, and what it says to run next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hive_ds.data.loader import check_folders
from hive_ds.errors import HiveError
from hive_ds.model.loading import read_language_config, read_vision_config
from hive_ds.recipe import dump_recipe, load_recipe
from hive_ds.stages import stage_by_number
from hive_ds.train_options import build_parser, next_commands


def after_stage(number: int, path: Path, *options: str, device: str = "cpu", ranks: int = 2) -> str:
    """What is said after a stage of `tiny` that ``ranks`` ranks, two on a host, have trained."""
    given = build_parser().parse_args(["--recipe", "tiny", "--stage", str(number), "--run", str(path), *options])
    run = SimpleNamespace(
        recipe=load_recipe("tiny", given.set),
        stage=stage_by_number(number),
        folder=SimpleNamespace(path=path / f"stage{number}"),
        world=SimpleNamespace(size=ranks, local_size=2),
        device=SimpleNamespace(type=device),
    )
    return " | ".join(next_commands(given, run))


def test_next_command(tmp_path: Path) -> None:
    end = f"--module hive_ds.train --recipe tiny --stage 2 --run {tmp_path}"
    assert after_stage(1, tmp_path) == f"next, modality_adaptation: deepspeed --num_accelerators 2 {end}"
    for elsewhere in (after_stage(1, tmp_path, device="cuda"), after_stage(1, tmp_path, ranks=4)):
        assert elsewhere == f"next, modality_adaptation: deepspeed {end}"
    assert after_stage(1, tmp_path, "--no-next") == ""
    assert after_stage(5, tmp_path) == f"next: hive-ds export vlm {tmp_path} OUT, for a stock LLaVA-style model"


def test_next_command_takes_the_runs_own_recipe_for_options_of_set(tmp_path: Path) -> None:
    written = tmp_path / "stage1" / "recipe.yaml"
    written.parent.mkdir()
    options = ("--set", "training.seed=3", "--set", "model.rope=1d")
    assert "--recipe tiny --set training.seed=3 --set model.rope=1d --stage 2" in after_stage(1, tmp_path, *options)
    written.write_text(dump_recipe(load_recipe("tiny", options[1::2])))
    assert f"--recipe {written} --stage 2 --run" in after_stage(1, tmp_path, *options)
    assert "--recipe tiny --set training.seed=4 --stage 2" in after_stage(1, tmp_path, "--set", "training.seed=4")
    written.write_text("of: another version\n")
    assert "--recipe tiny --set training.seed=3 " in after_stage(1, tmp_path, *options)


def test_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["--stage", "1", "--run", "a"])
    assert ended.value.code == 2
    line = "error: the following arguments are required: --recipe (see hive_ds.train --help)\n"
    assert capsys.readouterr().err == line


def test_what_make_quickstart_makes_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("tiny")
    with pytest.raises(HiveError, match=r"runs/quickstart/data/train: does not exist; `make quickstart` makes it$"):
        check_folders(recipe.data_of("connector_pretraining"))
    for read, name in (
        (read_vision_config, recipe.model.vision_encoder),
        (read_language_config, recipe.model.language_model),
    ):
        with pytest.raises(HiveError, match=f"{name} does not exist; `make quickstart` makes it$"):
            read(name)
