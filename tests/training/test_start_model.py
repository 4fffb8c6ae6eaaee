"""What every stage starts with, from base models to the judged VLM, for HIVE and the SA baseline; wrong encoders."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_encoder
from tiny_run import TinyRun

from hive_ds.config import RoutesConfig
from hive_ds.errors import HiveError
from hive_ds.model.cascaded import CascadedForCausalLM
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.identity import folder_sha256
from hive_ds.recipe import dump_recipe, load_recipe, resolve
from hive_ds.stages import stage_by_number
from hive_ds.training.attempt import Attempt
from hive_ds.training.distributed import World, start, stop
from hive_ds.training.run_folder import StageFolder
from hive_ds.training.start_model import start_model

SA = ("model.kind=cascaded", "model.routes=null")


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of this process, and no launcher variables left behind."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.setenv(name, "")
        start(World())
        yield
        stop()


def begin(tiny: TinyRun, run: str, number: int, *overrides: str) -> tuple[Any, Any, StageFolder]:
    """Model and processor as the stage starts, and its folder."""
    recipe = load_recipe(tiny.root / "recipe.yaml", overrides)
    folder = StageFolder(tiny.root / run, stage_by_number(number, recipe.model.kind))
    Attempt(folder.path, World()).make_folder()
    return *start_model(recipe, folder, World(), print), folder


def finish(model: Any, processor: Any, folder: StageFolder) -> None:
    """Leave the stage's folder as training does."""
    model.save_pretrained(folder.model)
    processor.save_pretrained(folder.model)
    folder.done.touch()


@pytest.mark.parametrize(("kind", "overrides"), [("hive", ()), ("sa", SA)])
def test_weights_go_from_stage_to_stage(tiny: TinyRun, kind: str, overrides: tuple[str, ...]) -> None:
    before: dict[str, torch.Tensor] = {}
    for number in (1, 2, 3, 4, 5):
        model, processor, folder = begin(tiny, kind, number, *overrides)
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        carried = [name for name in before if number != 4 or name.startswith("vision_encoder.")]
        assert all(torch.equal(own[name], before[name]) for name in carried)
        assert isinstance(model, HiveForCausalLM if kind == "hive" and number < 4 else CascadedForCausalLM)
        assert bool(getattr(processor.image_processor, "do_pad", False)) == (number == 4), "as the stage's data say"
        with torch.no_grad():
            trained = model.projectors if hasattr(model, "projectors") else model.projector
            for parameter in [*trained.parameters(), *(model.vision_encoder.parameters() if number == 3 else ())]:
                parameter.add_(0.01)
        finish(model, processor, folder)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = tiny.root / kind
    hashes = {folder_sha256(path) for path in (run / "encoder", *(run / f"stage{n}" / "model" for n in (3, 4, 5)))}
    assert hashes == {model.config.vision_sha256}
    assert folder_sha256(tiny.root / "encoder") not in hashes


def test_base_models_that_an_earlier_stage_did_not_begin_with_are_named(
    tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only stages 1 and 4 read base models, and what the others write to recipe.yaml names them."""
    for number, name in ((1, "model.language_model"), (4, "vlm.language_model")):
        base = ("vlm.vision_encoder=" + str(tiny.root / "encoder"),) if number == 4 else ()
        model, processor, folder = begin(tiny, "bases", number, *base)
        (folder.path / "recipe.yaml").write_text(dump_recipe(load_recipe(tiny.root / "recipe.yaml", base)))
        finish(model, processor, folder)
        begin(tiny, "bases", number + 1, *base, "data.shuffle=false")
        assert "warning" not in capsys.readouterr().out
        begin(tiny, "bases", number + 1, *base, f"{name}=/another")
        found = f"warning: {folder.model} goes on, made with recipe.{name} = {tiny.root}/language_model, not /another"
        assert found in capsys.readouterr().out.splitlines()


def test_routes_given_as_a_number_are_spread_and_early_ends_noted(
    tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.root / "recipe.yaml"  # 4 blocks, 5 layers
    recipe, origins = resolve(path, ["model.routes=2"])
    assert recipe.model.routes == RoutesConfig((1, 3), (2, 4))
    assert origins["model.routes.vision_blocks"] == "--set"
    (tiny.root / "kept.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tiny.root / "kept.yaml") == recipe
    with pytest.raises(HiveError, match=r"^model.routes \(--set\): 4 routes: expected 1 to 3 for 4 vision blocks"):
        load_recipe(path, ["model.routes=4"])
    begin(tiny, "spread", 1, "model.routes=2")
    assert "note:" not in capsys.readouterr().out
    begin(tiny, "early", 1, "model.routes={vision_blocks: [2], language_layers: [4]}")
    assert "note: the routes end at vision block 2 of 4; spread evenly: " in capsys.readouterr().out


@pytest.mark.parametrize("run", ["recipe.yaml", "recipe.yaml/run"])
def test_run_folder_that_cannot_be_written_is_named(tiny: TinyRun, run: str) -> None:
    wanted = f"{tiny.root / run}/stage1: cannot be written (Not a directory); expected a folder for this run"
    with pytest.raises(HiveError, match=re.escape(wanted)):
        begin(tiny, run, 1)


def test_base_goes_straight_to_stage_4(tiny: TinyRun) -> None:
    options = [f"stages.{stage_by_number(number).name}=null" for number in (1, 2, 3)]
    model, processor, folder = begin(tiny, "base", 4, *options, f"vlm.vision_encoder={tiny.root / 'encoder'}")
    assert model.config.vision_sha256 == folder_sha256(tiny.root / "encoder")
    finish(model, processor, folder)
    assert not (tiny.root / "base" / "encoder").exists()
    other = tiny.root / "other_encoder"
    shutil.copytree(tiny.root / "encoder", other)
    tiny_encoder(seed=7).save_pretrained(other)
    with pytest.raises(
        HiveError, match=r"stage4/model was made with the encoder of SHA-256 \w+, but .*other_encoder has"
    ):
        begin(tiny, "base", 5, *options, f"vlm.vision_encoder={other}")


def test_encoder_of_another_run_is_refused(tiny: TinyRun) -> None:
    with pytest.raises(HiveError, match=r"stage 4 starts from .*stage3/model, but .*stage3 is not finished"):
        begin(tiny, "foreign", 4)
    for number in (1, 2, 3):
        finish(*begin(tiny, "foreign", number))
    shutil.copytree(tiny.root / "encoder", tiny.root / "foreign" / "encoder")
    tiny_encoder(seed=7).save_pretrained(tiny.root / "foreign" / "encoder")
    with pytest.raises(HiveError, match=r"foreign/encoder holds another encoder than .*foreign/stage3/model"):
        begin(tiny, "foreign", 4)


def test_a_recipe_that_takes_another_block_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    finish(*begin(tiny, "block", 1, *SA))
    with pytest.raises(HiveError, match="was saved with feature_block -2, but the recipe says 2"):
        begin(tiny, "block", 2, *SA, "model.feature_block=2")
