"""The pictures of docs/method.md, each drawn from what the code says: routes, plans of stages, the reference's mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch

from hive_docs.gradient_paths import Paths, hive_paths, sa_paths
from hive_docs.roofline import draw_roofline
from hive_docs.svg import BRIDGE, FAINT, INK, LANGUAGE, LOSS, RULE, VISION, Drawing
from hive_ds.cost.known_models import KNOWN_MODELS
from hive_ds.cost.model import meta_model
from hive_ds.kernels import AttentionLayout, hierarchical_attention
from hive_ds.recipe import load_recipe
from hive_ds.training.groups import StagePlan

PAPER = "hive-siglip-l-mobilellm-600m"


def pictures() -> dict[str, str]:
    """SVG text by path below docs/."""
    return {
        "images/routes.svg": draw_routes(PAPER),
        "images/stages.svg": draw_stages([meta_model(load_recipe(PAPER), number)[1] for number in range(1, 6)]),
        "images/mask.svg": draw_mask(),
        "images/gradient_paths.svg": draw_gradient_paths(),
        "images/roofline.svg": draw_roofline(),
    }


def _depth(model: str) -> int:
    depth = KNOWN_MODELS[model].config["num_hidden_layers"]
    assert isinstance(depth, int)
    return depth


def draw_routes(name: str) -> str:
    """The routes of a recipe between the blocks of its encoder and the layers of its LLM."""
    model = load_recipe(name).model
    assert model.routes is not None
    num_blocks = _depth(model.vision_encoder)
    num_layers = _depth(model.language_model)
    top, low = 50.0, 530.0
    drawing = Drawing(760, 580, f"Routes of {name}: vision blocks to LLM layers")
    pairs = list(zip(model.routes.vision_blocks, model.routes.language_layers, strict=True))

    def block_y(block: int) -> float:
        return low - (block - 0.5) * (low - top) / num_blocks

    def layer_y(layer: int) -> float:
        return low - (layer + 0.5) * (low - top) / num_layers

    drawing.text(150, 30, model.vision_encoder.split("/")[-1], colour=VISION, anchor="middle")
    drawing.text(570, 30, model.language_model.split("/")[-1], colour=LANGUAGE, anchor="middle")
    for block in range(1, num_blocks + 1):
        routed = block in model.routes.vision_blocks
        height = (low - top) / num_blocks - 3
        drawing.box(
            70, block_y(block) - height / 2, 160, height, fill=VISION, line=VISION, opacity=0.75 if routed else 0.12
        )
        drawing.text(62, block_y(block) + 4, f"{block}", colour=FAINT, anchor="end", size=10)
    for layer in range(num_layers):
        routed = layer in model.routes.language_layers
        height = (low - top) / num_layers - 2
        drawing.box(
            490,
            layer_y(layer) - height / 2,
            160,
            height,
            fill=LANGUAGE,
            line=LANGUAGE,
            opacity=0.75 if routed else 0.12,
        )
        if routed:
            drawing.text(658, layer_y(layer) + 4, f"{layer}", colour=FAINT, size=10)
    for block, layer in pairs:
        start, end = (230, block_y(block)), (490, layer_y(layer))
        middle = (360, (start[1] + end[1]) / 2)
        drawing.line(start, end, colour=BRIDGE, arrow=True)
        drawing.box(middle[0] - 34, middle[1] - 8, 68, 16, fill="#ffffff", line=BRIDGE)
        drawing.text(middle[0], middle[1] + 4, "projector", colour=BRIDGE, anchor="middle", size=10)
    drawing.text(150, 556, "picture", colour=FAINT, anchor="middle")
    drawing.text(570, 556, "text", colour=FAINT, anchor="middle")
    drawing.text(360, 30, f"{len(pairs)} routes", colour=BRIDGE, anchor="middle")
    return drawing.render()


def draw_stages(plans: Sequence[StagePlan]) -> str:
    """Which module groups train in which stage, with their parameters."""
    hive = [
        plan
        for plan in plans
        if "vision_tail" in {group.name for group in plan.module_groups} and plan.stage.number <= 3
    ]
    judged = [plan for plan in plans if plan.stage.number > 3]
    rows = sum(len(_rows(part)) for part in (hive, judged))
    drawing = Drawing(760, 170 + 26 * rows, "What each stage trains, in parameters")
    y = _draw_table(drawing, 30.0, f"Pre-training the encoder ({PAPER})", hive)
    _draw_table(drawing, y + 34, "Judging it, frozen, under a chat LLM", judged)
    return drawing.render()


def _rows(plans: Sequence[StagePlan]) -> list[str]:
    return [group.name for group in plans[0].module_groups]


def _draw_table(drawing: Drawing, y: float, title: str, plans: Sequence[StagePlan]) -> float:
    drawing.text(20, y, title, size=13)
    y += 20
    for column, plan in enumerate(plans):
        label = f"{plan.stage.number} {plan.stage.name.replace('_', ' ')}"
        drawing.text(270 + 170 * column, y, label, colour=FAINT, anchor="middle", size=11)
    y += 10
    for name in _rows(plans):
        drawing.text(20, y + 16, name)
        for column, plan in enumerate(plans):
            trains, count = name in plan.trained_groups, _parameters(plan, name)
            colour = LOSS if trains else RULE
            drawing.box(
                190 + 170 * column, y, 160, 22, fill=colour, line=colour, opacity=0.8 if trains and count else 0.3
            )
            said = f"{_short(count)} {'train' if trains else 'frozen'}" if count else "none yet"
            drawing.text(
                270 + 170 * column, y + 16, said, colour="#ffffff" if trains and count else INK, anchor="middle"
            )
        y += 26
    return y


def _parameters(plan: StagePlan, group: str) -> int:
    return sum(math.prod(plan.shapes[name]) for name, its in plan.group_of.items() if its == group)


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


MASK_TEXT, MASK_IMAGES, MASK_OFFSETS = 9, (4, 3), (0, 5)
"""The sample of the mask's picture: text tokens, patches of its images, and where those stand."""


def visible_keys(text: int, images: Sequence[int], offsets: Sequence[int]) -> torch.Tensor:
    """Which keys (text first, then images) each text token of one sample sees, as the reference has it: (T, T + N)."""
    keys = text + sum(images)
    layout = AttentionLayout.build([text], [list(images)], [list(offsets)])
    value = torch.eye(keys, dtype=torch.float64)[:, None]  # what comes out of attention is then its probabilities
    zeros = torch.zeros_like(value)
    out = hierarchical_attention(
        zeros[:text], zeros[:text], value[:text], zeros[text:], value[text:], layout, backend="reference"
    )
    assert isinstance(out, torch.Tensor)
    return out[:, 0] > 0


def draw_mask() -> str:
    """The mask of one sample with two images, its keys in the order in which they stand in the sample."""
    visible = visible_keys(MASK_TEXT, MASK_IMAGES, MASK_OFFSETS)
    order = _in_order(MASK_TEXT, MASK_IMAGES, MASK_OFFSETS)
    side, left, top = 26, 130, 92
    drawing = Drawing(left + side * len(order) + 30, top + side * MASK_TEXT + 62, "Which keys each text token sees")
    drawing.text(20, 24, "Columns: keys, text (orange) and patches of two images (blue), in order.")
    drawing.text(20, 44, "Rows: queries, of text alone. Full colour: seen.")
    for column, (key, label) in enumerate(order):
        x = left + side * column
        colour = LANGUAGE if key < MASK_TEXT else VISION
        drawing.text(x + side / 2, top - 8, label, colour=colour, anchor="middle", size=10)
        for row in range(MASK_TEXT):
            seen = bool(visible[row, key])
            drawing.box(
                x + 1, top + side * row + 1, side - 2, side - 2, fill=colour, line=RULE, opacity=0.75 if seen else 0.06
            )
    for row in range(MASK_TEXT):
        drawing.text(left - 12, top + side * row + 17, f"token {row}", colour=FAINT, anchor="end", size=11)
    below = top + side * MASK_TEXT + 26
    drawing.text(
        left,
        below,
        f"media offsets {', '.join(map(str, MASK_OFFSETS))}: tokens from there on see all patches of the image,",
    )
    drawing.text(left, below + 18, "those before it none. Patches have no queries, hence no rows.")
    return drawing.render()


def _in_order(text: int, images: Sequence[int], offsets: Sequence[int]) -> list[tuple[int, str]]:
    """Index and label of every key, in the order of the sample."""
    order, first = [], text
    starts = {}
    for number, (length, offset) in enumerate(zip(images, offsets, strict=True)):
        starts[offset] = [(first + patch, f"{'ab'[number]}{patch}") for patch in range(length)]
        first += length
    for token in range(text):
        order += [*starts.get(token, []), (token, f"t{token}")]
    return order


def draw_gradient_paths() -> str:
    """Blocks and layers between the loss and each encoder block, for HIVE and SA."""
    recipe, cascaded = load_recipe(PAPER), load_recipe("sa-siglip-l-mobilellm-600m")
    blocks = _depth(recipe.model.vision_encoder)
    layers = _depth(recipe.model.language_model)
    assert recipe.model.routes is not None
    ways = {
        "HIVE, shortest": hive_paths(recipe.model.routes, blocks, layers, fewest=sum),
        "HIVE, next route": hive_paths(recipe.model.routes, blocks, layers, fewest=itemgetter(1)),
        "SA": sa_paths(cascaded.model.feature_block, blocks, layers),
    }
    drawing = Drawing(760, 560, "Paths of the gradient to each encoder block")
    drawing.text(20, 26, "Paths of the loss's gradient to the output of each encoder block", size=13)
    for place, (name, paths) in enumerate(ways.items()):
        _draw_paths(drawing, 76 + 158.0 * place, name, paths, layers + blocks)
    drawing.text(70, 546, "LLM layers", colour=LANGUAGE)
    drawing.text(150, 546, "encoder blocks", colour=VISION)
    drawing.text(258, 546, "that backward passes through, by encoder block; no bar: no gradient", colour=FAINT)
    return drawing.render()


def _draw_paths(drawing: Drawing, top: float, name: str, paths: Paths, most: int) -> None:
    height, width = 100.0, 26.0
    unit = height / most
    drawing.text(70, top - 16, name)
    drawing.line((70, top + height), (70 + width * len(paths), top + height), colour=RULE)
    for block, path in enumerate(paths, 1):
        x = 70 + width * (block - 1)
        drawing.text(x + width / 2, top + height + 14, f"{block}", colour=FAINT, anchor="middle", size=10)
        if path is None:
            continue
        layers, blocks = path
        drawing.box(
            x + 4, top + height - unit * layers, width - 8, unit * layers, fill=LANGUAGE, line=LANGUAGE, opacity=0.75
        )
        above = top + height - unit * (layers + blocks)
        drawing.box(x + 4, above, width - 8, unit * blocks, fill=VISION, line=VISION, opacity=0.75)
        drawing.text(x + width / 2, above - 4, f"{layers + blocks}", colour=INK, anchor="middle", size=10)
