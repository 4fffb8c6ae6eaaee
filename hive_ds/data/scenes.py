"""Captioned scenes with known answers: a data set made here, so that what a model learned can be measured.

A scene is a 4 x 4 grid that holds 1 to 3 shapes and usually one short word, over clutter. Every question has one right
answer that follows from the scene's description, and answers are balanced so that a blind guess scores low.
Everything is a function of (seed, split, index).
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (225, 45, 45),
    "green": (50, 175, 70),
    "blue": (55, 90, 230),
    "yellow": (240, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 35),
    "cyan": (70, 215, 225),
    "white": (250, 250, 250),
}
SIZES = {"small": 0.053, "medium": 0.08, "large": 0.107}
"""Radius as a share of the image's side."""
WORDS = ("be", "do", "go", "hi", "it", "no", "ox", "up")
DIRECTIONS = ("left", "right", "above", "below")
GRID = 4
JITTER = 1 / 64
"""How far a shape may lie from the middle of its cell, as a share of the image's side. Tiny encoders see shapes that
keep to a grid within minutes, and shapes anywhere not within an hour."""
MOST_ITEMS = 3
MOST_COUNTED = 3

ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "count": tuple(str(number) for number in range(MOST_COUNTED + 1)),
    "relation": DIRECTIONS,
    "text": WORDS,
}
"""Kind of question -> every answer it can have."""


@dataclass(frozen=True)
class Item:
    """One shape. ``x`` and ``y`` are its centre as shares of the image's side, from the upper left."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    x: float
    y: float

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows; ``clutter`` seeds the lines and specks that mean nothing."""

    items: tuple[Item, ...]
    """In reading order: row by row, left to right."""
    word: str | None
    word_cell: tuple[int, int]
    clutter: int

    def as_dict(self) -> dict:
        """The description as JSON has it: lists, no tuples."""
        return {**asdict(self), "items": [asdict(item) for item in self.items], "word_cell": list(self.word_cell)}


@dataclass(frozen=True)
class Question:
    """A question about one scene with its only right answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class SceneWithQuestions:
    """A scene, and the questions chosen about it, the leading one first."""

    scene: Scene
    questions: tuple[Question, ...]


def random_scene(rng: random.Random, most: int = MOST_ITEMS) -> Scene:
    """Draw a scene of 1 to ``most`` shapes, fewer more often; some share a shape or a colour, or are aligned."""
    count = min(rng.randint(1, most), rng.randint(1, most))
    cells = _cells(count + 1, rng)
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    colours = [rng.choice(tuple(COLOURS)) for _ in range(count)]
    repeated = rng.choice((shapes, colours, None, None))
    if repeated is not None and count > 1:
        copies = rng.randint(2, min(count, MOST_COUNTED))
        repeated[:copies] = [repeated[0]] * copies
        rng.shuffle(repeated)
    items = [_place(*one, rng) for one in zip(shapes, colours, sorted(cells[:-1]), strict=True)]
    word = rng.choice(WORDS) if rng.random() < 0.8 else None
    return Scene(tuple(items), word, cells[-1], rng.randrange(2**31))


def _cells(count: int, rng: random.Random) -> list[tuple[int, int]]:
    """Distinct cells in random order; in half of the scenes the first two share a row or a column."""
    every = [(row, column) for row in range(GRID) for column in range(GRID)]
    cells = rng.sample(every, count)
    if rng.random() < 0.5:
        row, column = cells[0]
        aligned = [cell for cell in every if (cell[0] == row) != (cell[1] == column) and cell not in cells[2:]]
        cells[1] = rng.choice(aligned)
    return cells


def _place(shape: str, colour: str, cell: tuple[int, int], rng: random.Random) -> Item:
    size = rng.choice(tuple(SIZES))
    row, column = cell
    x = (column + 0.5) / GRID + rng.uniform(-JITTER, JITTER)
    y = (row + 0.5) / GRID + rng.uniform(-JITTER, JITTER)
    return Item(shape, colour, size, row, column, round(x, 4), round(y, 4))


def direction(item: Item, other: Item) -> str | None:
    """Where ``item`` lies as seen from ``other``; None unless they share a row or a column of the grid."""
    if item.row == other.row and item.column != other.column:
        return "left" if item.column < other.column else "right"
    if item.column == other.column and item.row != other.row:
        return "above" if item.row < other.row else "below"
    return None


def all_questions(scene: Scene) -> list[Question]:
    """Every question that has exactly one right answer in this scene."""
    items = scene.items
    shapes = [item.shape for item in items]
    colours = [item.colour for item in items]
    lone_shapes = [item for item in items if shapes.count(item.shape) == 1]
    lone_colours = [item for item in items if colours.count(item.colour) == 1]
    found = [Question("colour", f"what colour is the {item.shape}?", item.colour) for item in lone_shapes]
    found += [Question("shape", f"what shape is {item.colour}?", item.shape) for item in lone_colours]
    found += [Question("size", f"what size is the {item.shape}?", item.size) for item in lone_shapes]
    found += [Question("count", f"how many shapes are {c}?", str(colours.count(c))) for c in COLOURS]
    found += [Question("count", f"how many {plural(s)} are there?", str(shapes.count(s))) for s in SHAPES]
    found += [
        Question("relation", f"where is the {item.shape} from the {other.shape}?", answer)
        for item in lone_shapes
        for other in lone_shapes
        if (answer := direction(item, other)) is not None
    ]
    if scene.word:
        found.append(Question("text", "what does the text say?", scene.word))
    return [question for question in found if question.answer in ANSWERS[question.kind]]


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def caption(scene: Scene) -> str:
    """One sentence that names every shape in reading order, and the word."""
    parts = [f"a {item.size} {item.colour} {item.shape}" for item in scene.items]
    if scene.word:
        parts.append(f"the word {scene.word}")
    return f"{', '.join(parts)}."


def make_scene(seed: int, split: str, index: int, *, questions: int) -> SceneWithQuestions:
    """The scene of (seed, split, index) with up to ``questions`` questions, each of another kind where kinds last.

    The leading question cycles through kinds and through each kind's answers: over ``index`` its answers are uniform.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    kinds = list(ANSWERS)
    kind = kinds[index % len(kinds)]
    answers = ANSWERS[kind]
    answer = answers[index // len(kinds) % len(answers)]
    while True:
        scene = random_scene(rng)
        matching = [q for q in all_questions(scene) if q.kind == kind and q.answer == answer]
        if matching:
            break
    chosen = [rng.choice(matching), *_further_questions(scene, kind, rng)]
    return SceneWithQuestions(scene, tuple(chosen[:questions]))


def _further_questions(scene: Scene, leading: str, rng: random.Random) -> list[Question]:
    """One question of every other kind that this scene allows, in random order, its answer drawn before its wording."""
    by_kind: dict[str, dict[str, list[Question]]] = {}
    for question in all_questions(scene):
        by_kind.setdefault(question.kind, {}).setdefault(question.answer, []).append(question)
    kinds = [kind for kind in by_kind if kind != leading]
    rng.shuffle(kinds)
    return [rng.choice(by_kind[kind][rng.choice(list(by_kind[kind]))]) for kind in kinds]
