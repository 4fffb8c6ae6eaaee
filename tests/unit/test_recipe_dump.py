"""A recipe that is written out is the same recipe when it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_ds.recipe import dump_recipe, load_recipe, recipe_names, resolve


@pytest.mark.parametrize("name", recipe_names())
def test_dump_is_a_recipe_again(name: str, tmp_path: Path):
    recipe, origins = resolve(name)
    for text in (dump_recipe(recipe), dump_recipe(recipe, origins)):
        (tmp_path / "dumped.yaml").write_text(text)
        assert load_recipe(tmp_path / "dumped.yaml") == recipe
    shown = dump_recipe(recipe, origins).splitlines()
    assert sum("  # " in line for line in shown) == len(origins)


printable = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=40)
numbers = st.floats(min_value=1e-300, max_value=1e300)


def test_dump_keeps_weighted_folders(tmp_path: Path):
    recipe = load_recipe("tiny", ["data.train={s3://a b: 1, /c#d: 0.5, '1': 2}"])
    (tmp_path / "dump.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "dump.yaml") == recipe
    assert load_recipe(tmp_path / "dump.yaml", ["data.train=a"]).data.train == "a"


def test_a_word_beside_numbers_is_kept(tmp_path: Path):
    auto = "stages.vision_finetuning.micro_batch_size=auto"
    recipe, origins = resolve("tiny", [auto])
    assert recipe.stages["vision_finetuning"].micro_batch_size == "auto"
    assert origins["stages.vision_finetuning.micro_batch_size"] == "--set"
    (tmp_path / "dump.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "dump.yaml") == recipe
    assert load_recipe(tmp_path / "dump.yaml", [auto.replace("auto", "7")]).stages["vision_finetuning"].micro_batch == 7


@settings(max_examples=60, deadline=None)
@given(
    text=printable,
    lr=numbers,
    folders=st.dictionaries(printable, numbers, min_size=1, max_size=3),
    steps=st.none() | st.integers(1),
)
def test_dump_keeps_any_value(tmp_path_factory, text: str, lr: float, folders: dict[str, float], steps: int | None):
    recipe = load_recipe("tiny")
    stage = replace(recipe.stages["vision_finetuning"], lr=lr, steps=steps)
    data = replace(recipe.data, cache=text, train=folders)
    changed = replace(recipe, name=text, data=data, stages={"vision_finetuning": stage})
    path = tmp_path_factory.mktemp("dump") / "dumped.yaml"
    path.write_text(dump_recipe(changed), encoding="utf-8")
    assert load_recipe(path) == changed
