"""Scenes: the same every time, and every answer follows from the description, worked out here in another way."""

from __future__ import annotations

import io
import math
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hive_ds.data.scenes import ANSWERS, COLOURS, MOST_ITEMS, SIZES, Item, Scene, all_questions, caption, make_scene
from hive_ds.data.scenes_drawing import draw_scene
from hive_ds.data.scenes_samples import (
    caption_samples,
    describe,
    question_samples,
    scene_samples,
    text_samples,
    write_scenes,
)
from hive_ds.errors import HiveError

STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}


def holders(scene: dict, **attributes: str) -> list[dict]:
    return [item for item in scene["items"] if all(item[key] == value for key, value in attributes.items())]


def only(scene: dict, **attributes: str) -> dict:
    (item,) = holders(scene, **attributes)  # a question about one shape is asked only where there is one
    return item


def singular(word: str) -> str:
    return re.sub(r"es$", "", word) if word.endswith("sses") else word[:-1]


def is_right(scene: dict, question: str, answer: str) -> bool:
    """Judge an answer from the scene's description and the words of the question alone."""
    words = question.rstrip("?").split()
    match words:
        case ["what", "colour", "is", "the", shape]:
            return only(scene, shape=shape)["colour"] == answer
        case ["what", "shape", "is", colour]:
            return only(scene, colour=colour)["shape"] == answer
        case ["what", "size", "is", "the", shape]:
            return only(scene, shape=shape)["size"] == answer
        case ["how", "many", "shapes", "are", colour]:
            return len(holders(scene, colour=colour)) == int(answer)
        case ["how", "many", shapes, "are", "there"]:
            return len(holders(scene, shape=singular(shapes))) == int(answer)
        case ["where", "is", "the", shape, "from", "the", other]:
            here, there = only(scene, shape=shape), only(scene, shape=other)
            apart = (here["row"] - there["row"], here["column"] - there["column"])
            return tuple(np.sign(apart)) == STEPS[answer]
        case ["what", "does", "the", "text", "say"]:
            return scene["word"] == answer
    raise AssertionError(f"unknown question {question!r}")


def question_of(content: str) -> str:
    """The last sentence, without what is shown or told before it."""
    return re.split(r"<image>|\. ", content)[-1]


def test_every_answer_follows_from_the_scene() -> None:
    seen = Counter()
    for index in range(300):
        made = make_scene(3, "check", index, questions=6)
        scene = made.scene.as_dict()
        assert 1 <= len(made.scene.items) <= MOST_ITEMS
        for question in all_questions(made.scene):
            assert is_right(scene, question.text, question.answer), (question, scene)
            assert not any(
                is_right(scene, question.text, other) for other in ANSWERS[question.kind] if other != question.answer
            )
            seen[question.kind, question.answer] += 1
    assert set(seen) == {(kind, answer) for kind, answers in ANSWERS.items() for answer in answers}


def test_shapes_keep_apart_and_lie_where_the_description_says() -> None:
    for index in range(40):
        scene = make_scene(0, "apart", index, questions=1).scene
        cells = [(item.row, item.column) for item in scene.items] + [scene.word_cell]
        assert len(set(cells)) == len(cells)
        pixels = np.asarray(draw_scene(scene, 64)).astype(int)
        for item in scene.items:
            assert nearest_colour(pixels, item) == item.colour
    assert draw_scene(scene, 128).size == (128, 128)


def nearest_colour(pixels: np.ndarray, item: Item) -> str:
    """The colour on the item: a ring's is beside its centre."""
    x, y = item.x * 64, item.y * 64
    beside = 0.75 * SIZES[item.size] * 64 if item.shape == "ring" else 0
    found = pixels[int(y), int(x + beside)]
    return min(COLOURS, key=lambda name: int(np.abs(found - np.array(COLOURS[name])).sum()))


def test_samples_are_a_function_of_seed_split_and_index() -> None:
    first, again = list(scene_samples(1, "train", 4, 64)), list(scene_samples(1, "train", 4, 64))
    assert first == again
    assert list(scene_samples(1, "train", 2, 64)) == first[:2]
    assert [s.images for s in scene_samples(2, "train", 4, 64)] != [s.images for s in first]
    assert [s.images for s in scene_samples(1, "validation", 4, 64)] != [s.images for s in first]


def test_turns_carry_their_answers_and_the_caption_comes_last() -> None:
    for sample in [*scene_samples(0, "train", 12, 64), *text_samples(0, "text", 12)]:
        said = [turn.content for turn in sample.turns if turn.role == "assistant"]
        asked = [turn.content for turn in sample.turns if turn.role == "user"]
        assert said == sample.meta["answers"]
        if sample.images:
            assert sample.meta["kinds"][-1] == "caption"
            assert Image.open(io.BytesIO(sample.images[0])).size == (64, 64)
            assert not any(said[-1] in content for content in asked)
            for question, answer in list(zip(asked, said, strict=True))[:-1]:
                assert is_right(sample.meta["scene"], question_of(question), answer)


def test_a_told_scene_says_what_is_asked_about_it() -> None:
    for index, sample in enumerate(text_samples(0, "text", 12)):
        scene = make_scene(0, "text", index, questions=6).scene
        assert sample.turns[0].content.startswith(caption(scene))
        assert is_right(scene.as_dict(), question_of(sample.turns[0].content), sample.turns[1].content)


def test_blind_guesses_score_low() -> None:
    """The best answer without looking, even one chosen for each wording of a question, is right rarely."""
    questions = [make_scene(0, "questions", index, questions=1).questions[0] for index in range(1440)]
    rows = [(question.kind, question.text, question.answer) for question in questions]
    for kind, answers in ANSWERS.items():
        of_kind = [(question, answer) for k, question, answer in rows if k == kind]
        counts = Counter(answer for _, answer in of_kind)
        assert set(counts) == set(answers)
        assert max(counts.values()) - min(counts.values()) <= 1
        half = len(of_kind) // 2
        by_wording: dict[str, Counter] = {}
        for question, answer in of_kind[:half]:
            by_wording.setdefault(question, Counter())[answer] += 1
        right = sum(
            by_wording[question].most_common(1)[0][0] == answer
            for question, answer in of_kind[half:]
            if question in by_wording
        )
        assert right / half < 1 / len(answers) + 0.12, kind


def item(shape: str, colour: str, row: int, column: int, size: str = "large") -> Item:
    return Item(shape, colour, size, row, column, (column + 0.5) / 4, (row + 0.5) / 4)


def test_words_of_a_scene() -> None:
    ring, cross, other = item("ring", "red", 0, 1), item("cross", "cyan", 0, 3, "small"), item("ring", "red", 2, 3)
    scene = Scene((ring, cross, other), "up", (3, 0), 0)
    named = "a large red ring, a small cyan cross, a large red ring"
    assert caption(scene) == f"{named}, the word up."
    assert caption(replace(scene, word=None)) == f"{named}."
    told = {
        "the red ring is left of the cyan cross",
        "the cyan cross is right of the red ring",
        "the cyan cross is above of the red ring",
        "the red ring is below of the cyan cross",
    }
    seen = set()
    for seed in range(20):
        first, second, *rest = describe(scene, random.Random(seed)).removeprefix(f"{caption(scene)} ").split(". ")
        assert rest == []
        seen |= {first, second.removesuffix(".")}
    assert seen == told
    twins = Scene((ring, item("ring", "red", 0, 2)), None, (3, 0), 0)
    assert describe(twins, random.Random(0)) == "a large red ring, a large red ring."


WORD = """
####..#####
#...#.#....
#...#.#....
####..####.
#...#.#....
#...#.#....
####..#####
"""


def test_a_word_is_drawn_letter_by_letter_in_its_cell() -> None:
    bright = np.asarray(draw_scene(Scene((), "be", (1, 2), 5), 64)).min(axis=2) > 180  # clutter is darker
    rows, columns = np.nonzero(bright)
    box = bright[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert "\n".join("".join(".#"[int(pixel)] for pixel in row) for row in box) == WORD.strip()
    assert (rows.mean(), columns.mean()) == pytest.approx((1.5 * 16, 2.5 * 16), abs=2)


SHARES = {
    "circle": math.pi,
    "ring": 0.75 * math.pi,
    "square": 1.8**2,
    "cross": 8 * 0.33 - 4 * 0.33**2,
    "triangle": 1.284,
}
"""Area over the square of the radius."""


@pytest.mark.parametrize("shape", SHARES)
def test_a_shape_has_its_area_and_a_triangle_stands_on_its_base(shape: str) -> None:
    pixels = np.asarray(draw_scene(Scene((item(shape, "red", 1, 1),), None, (3, 3), 0), 512)).astype(int)
    drawn = np.abs(pixels - np.array(COLOURS["red"])).sum(axis=2) < 40
    assert drawn.sum() / (SIZES["large"] * 512) ** 2 == pytest.approx(SHARES[shape], rel=0.03)
    upper, lower = drawn[:192].sum(), drawn[192:].sum()
    assert upper / lower == pytest.approx(0.66 if shape == "triangle" else 1, rel=0.05)


def test_folders_read_back(tmp_path) -> None:
    mds = pytest.importorskip("hive_ds.data.mds", reason="needs mosaicml-streaming: pip install 'hive-ds[streaming]'")
    told: list[tuple[int, int]] = []
    folders = write_scenes(
        tmp_path / "data", 6, seed=5, held_out=3, num_text=4, num_captions=5, progress=lambda *done: told.append(done)
    )
    assert told == [(number, 24) for number in range(1, 25)]
    assert mds.read_mds(folders.train) == list(scene_samples(5, "train", 6, 64))
    assert mds.read_mds(folders.questions) == list(question_samples(5, "questions", 3, 64))
    assert mds.read_mds(folders.validation) == list(scene_samples(5, "validation", 3, 64))
    assert mds.read_mds(folders.text) == list(text_samples(5, "text", 4))
    assert mds.read_mds(folders.text_validation) == list(text_samples(5, "text_validation", 3))
    assert mds.read_mds(folders.captions) == list(caption_samples(5, "captions", 5, 64))
    assert [len(sample.meta["scene"]["items"]) for sample in mds.read_mds(folders.captions)] == [1] * 5
    few = write_scenes(tmp_path / "few", 2)
    assert [len(mds.read_mds(folder)) for folder in (few.train, few.captions, few.text)] == [2] * 3
    assert [len(mds.read_mds(folder)) for folder in (few.validation, few.questions, few.text_validation)] == [1] * 3
    inside = "captions, questions, text, text_validation, train, validation$"
    with pytest.raises(HiveError, match=f"holds no index.json; expected one of its folders {inside}"):
        mds.read_mds(tmp_path / "data")
    with pytest.raises(HiveError, match="not an empty folder"):
        write_scenes(tmp_path / "data", 6, seed=5)
    with pytest.raises(HiveError, match="num is 0"):
        write_scenes(tmp_path / "none", 0)
    with pytest.raises(HiveError, match="size is 8"):
        write_scenes(tmp_path / "none", 1, size=8)
