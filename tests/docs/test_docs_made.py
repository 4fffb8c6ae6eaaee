"""What `make docs` writes is what the repository holds, and says all that the code says."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from functools import cache
from operator import itemgetter
from typing import Any

import pytest
import torch
from doc_pages import ROOT
from hive_docs.commands import leaf_parsers
from hive_docs.gradient_paths import hive_paths, sa_paths
from hive_docs.pages import DOCS
from hive_docs.pages import reference as make_reference
from hive_docs.recipes import changes, field_docs, sections
from tiny_models import random_images, random_tokens, tiny_cascaded, tiny_hive
from torch import nn

from hive_ds.cli import build_parser
from hive_ds.config import Recipe, RoutesConfig
from hive_ds.model.language import decoder
from hive_ds.model.vision import vision_blocks
from hive_ds.recipe import load_recipe, recipe_names
from hive_ds.recipe_values import known_keys
from hive_ds.training.metrics import TRAIN_KEYS


@cache
def reference() -> dict[str, str]:
    return make_reference()


@pytest.mark.parametrize("name", ["reference/commands.md", "reference/recipes.md"])
def test_reference_is_up_to_date(name: str):
    assert (DOCS / name).read_text() == reference()[name], "run: make docs"


def test_pictures_are_up_to_date():
    from hive_docs.pictures import pictures

    for name, text in pictures().items():
        assert (DOCS / name).read_text() == text, f"{name}: run: make docs"


def test_roofline_table_is_that_of_the_result_file():
    from hive_docs.roofline import table

    assert "\n".join(table()) in (DOCS / "performance.md").read_text()


def test_keys_of_a_train_line_are_explained():
    text = (DOCS / "training.md").read_text()
    table = text[text.index("## Watch a run") : text.index("**A healthy run**")]
    first_cells = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    assert sorted(re.findall(r"`(\w+)`", first_cells)) == sorted(TRAIN_KEYS)


def test_sketch_in_the_readme_has_routes_of_the_recipe():
    routes = load_recipe("hive-siglip-l-mobilellm-600m").model.routes
    assert routes
    shown = re.findall(r"^ block +(\d+) .* layer +(\d+)", (ROOT / "README.md").read_text(), re.M)
    pairs = {*zip(routes.vision_blocks, routes.language_layers, strict=True)}
    assert len(shown) == 3
    assert {(int(block), int(layer)) for block, layer in shown} <= pairs


def test_reference_holds_every_key_with_its_words():
    page = reference()["reference/recipes.md"]
    documented = {key.replace("<stage>", "STAGE") for key in known_keys(Recipe)}
    for prefix, cls in sections():
        for name, doc in field_docs(cls).items():
            key = f"{prefix}.{name}".lstrip(".")
            documented.discard(key)
            part = key in {one for one, _ in sections()} or f"{key}.STAGE" in {one for one, _ in sections()}
            assert doc or part, f"{key}: hive_ds/config.py says nothing of it"
    assert {key for key in documented if not key.startswith("stages.STAGE.data.")} == set()
    assert all(f"### {name}\n" in page for name in recipe_names())


def test_changes_of_a_recipe_are_those_that_make_it():
    assert changes("tiny", "tiny-last") == [("model.routes.vision_blocks", "[1, 2, 3]", "[4, 4, 4]")]
    rows = changes("hive-siglip-l-mobilellm-600m", "sa-siglip-l-mobilellm-600m")
    overrides = [f"{key}={new}" for key, _, new in rows]
    made, shipped = load_recipe("hive-siglip-l-mobilellm-600m", overrides), load_recipe("sa-siglip-l-mobilellm-600m")
    assert (made.model, made.stages, made.data) == (shipped.model, shipped.stages, shipped.data)


def test_reference_holds_every_command_and_option():
    page = reference()["reference/commands.md"]
    for name, leaf in leaf_parsers(build_parser()):
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for action in leaf._actions:
            if action.help != argparse.SUPPRESS and not {"--help", "--debug"} & set(action.option_strings):
                assert all(f"`{option}`" in section for option in action.option_strings), (name, action)
        assert not re.search(r"%\(\w+\)s", section)


def test_nothing_of_this_machine_is_in_the_reference():
    assert [name for name, text in reference().items() if str(ROOT) in text] == []


class _Scaled(torch.autograd.Function):
    """The same values, and a factor on their gradient."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        context.factor = factor
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * context.factor, None


def gradient_norms(model: nn.Module, factor_of: dict[nn.Module, float], inputs: dict[str, Any]) -> list[float]:
    """Norm of the gradient at the output of each encoder block, with factors on the gradient at outputs of modules."""
    kept: dict[nn.Module, torch.Tensor] = {}

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        value = _Scaled.apply(value, factor_of.get(module, 1.0))
        value.retain_grad()
        kept[module] = value
        return (value, *output[1:]) if isinstance(output, tuple) else value

    blocks = list(vision_blocks(model.vision_encoder))
    hooks = [module.register_forward_hook(hook) for module in {*blocks, *factor_of}]
    model(**inputs).loss.backward()
    for one in hooks:
        one.remove()
    gradients = [kept[block].grad if block in kept else None for block in blocks]
    return [0.0 if gradient is None else gradient.norm().item() for gradient in gradients]


def fewest_on_the_way(model: nn.Module, modules: Iterable[nn.Module]) -> list[int | None]:
    """By encoder block, how many of ``modules`` are on the way of the gradient that has the fewest of them.

    A factor on the gradient at each of them comes to a block in every power that a way has; the lowest one decides.
    """
    ids = random_tokens(6)
    inputs = {"input_ids": ids, "text_lengths": [6], "image_offsets": [[0]], "labels": ids}
    inputs["pixel_values"] = random_images(1).double()
    modules = list(modules)
    large, small = (gradient_norms(model, dict.fromkeys(modules, factor), inputs) for factor in (1e-4, 1e-5))
    powers = [math.log10(a / b) if a and b else None for a, b in zip(large, small, strict=True)]
    assert all(power is None or abs(power - round(power)) < 0.01 for power in powers), powers
    return [None if power is None else round(power) for power in powers]


def test_ways_of_the_gradient_are_those_of_autograd():
    routes = RoutesConfig((1, 2, 3), (0, 3, 4))
    hive = tiny_hive(vision_blocks=routes.vision_blocks, language_layers=routes.language_layers).double()
    blocks, layers = vision_blocks(hive.vision_encoder), decoder(hive.language_model).layers
    shortest = hive_paths(routes, len(blocks), len(layers), fewest=sum)
    assert fewest_on_the_way(hive, [*blocks, *layers]) == [path and sum(path) for path in shortest] == [3, 2, 1, None]
    next_route = hive_paths(routes, len(blocks), len(layers), fewest=itemgetter(1))
    assert fewest_on_the_way(hive, blocks) == [path and path[1] for path in next_route] == [0, 0, 0, None]
    cascaded = tiny_cascaded().double()
    blocks, layers = vision_blocks(cascaded.vision_encoder), decoder(cascaded.language_model).layers
    only = sa_paths(-2, len(blocks), len(layers))
    assert fewest_on_the_way(cascaded, [*blocks, *layers]) == [path and sum(path) for path in only] == [7, 6, 5, None]
    assert fewest_on_the_way(cascaded, blocks) == [path and path[1] for path in only] == [2, 1, 0, None]
