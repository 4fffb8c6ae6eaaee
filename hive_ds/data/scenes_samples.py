"""Samples made of scenes, and the folders of MDS shards that a run reads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.scenes import ANSWERS, Scene, SceneWithQuestions, caption, direction, make_scene, random_scene
from hive_ds.data.scenes_drawing import draw_scene, png
from hive_ds.data.schema import Sample, Turn, caption_sample
from hive_ds.errors import HiveError

CAPTION_REQUEST = "describe the picture."
MIN_IMAGE_SIZE = 32
"""Pixels; below it the words cannot be told apart."""


@dataclass(frozen=True)
class SceneFolders:
    """What `write_scenes` made below its output folder."""

    root: Path

    @property
    def train(self) -> Path:
        """Pictures with questions, answers and a caption."""
        return self.root / "train"

    @property
    def validation(self) -> Path:
        """The same from held-out scenes, for the validation loss."""
        return self.root / "validation"

    @property
    def questions(self) -> Path:
        """Held-out pictures with one question each; every kind equally often, and within it every answer."""
        return self.root / "questions"

    @property
    def captions(self) -> Path:
        """Pictures of one shape each with their captions: the encoder's pretraining."""
        return self.root / "captions"

    @property
    def text(self) -> Path:
        """Text alone, in the same words: descriptions with questions about them."""
        return self.root / "text"

    @property
    def text_validation(self) -> Path:
        """Held-out text, for the check whether the LLM forgets."""
        return self.root / "text_validation"


def write_scenes(
    out: str | Path,
    num: int,
    seed: int = 0,
    *,
    size: int = 64,
    held_out: int | None = None,
    num_text: int | None = None,
    num_captions: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SceneFolders:
    """Write scenes as MDS shards; the same arguments give the same bytes.

    Args:
        out: new folder.
        num: training pictures.
        seed: of everything.
        size: side of a picture in pixels.
        held_out: samples of each held-out folder (validation, questions, text_validation); default a tenth of ``num``.
        num_text: conversations without a picture; default ``num``.
        num_captions: pictures of one shape with a caption; default ``num``.
        progress: called with (written, all) after every sample.

    Raises:
        HiveError: ``num`` or ``size`` too small, or ``out`` holds shards already.
    """
    from hive_ds.data.mds import write_mds  # needs the [streaming] extra, which the samples themselves do not

    if num < 1:
        raise HiveError(f"scenes: num is {num}, expected at least 1")
    if size < MIN_IMAGE_SIZE:
        raise HiveError(f"scenes: size is {size} pixels, expected at least {MIN_IMAGE_SIZE}")
    held_out = max(1, num // 10) if held_out is None else held_out
    num_text = num if num_text is None else num_text
    num_captions = num if num_captions is None else num_captions
    folders = SceneFolders(Path(out))
    parts: list[tuple[int, Iterator[Sample], Path]] = [
        (num, scene_samples(seed, "train", num, size), folders.train),
        (held_out, scene_samples(seed, "validation", held_out, size), folders.validation),
        (held_out, question_samples(seed, "questions", held_out, size), folders.questions),
        (num_captions, caption_samples(seed, "captions", num_captions, size), folders.captions),
        (num_text, text_samples(seed, "text", num_text), folders.text),
        (held_out, text_samples(seed, "text_validation", held_out), folders.text_validation),
    ]
    total, done = sum(count for count, _, _ in parts), 0
    for count, samples, folder in parts:
        write_mds(_reported(samples, progress, done, total) if progress else samples, folder)
        done += count
    return folders


def _reported(
    samples: Iterator[Sample], progress: Callable[[int, int], None], done: int, total: int
) -> Iterator[Sample]:
    for index, sample in enumerate(samples, start=1):
        yield sample
        progress(done + index, total)


def scene_samples(seed: int, split: str, num: int, size: int) -> Iterator[Sample]:
    """Yield pictures with one question of every kind that they allow, then a request for the caption.

    The caption comes last: before the questions it would give their answers away.
    """
    for index in range(num):
        made = make_scene(seed, split, index, questions=len(ANSWERS))
        pairs = _questions_and_caption(made)
        meta = {
            "kinds": _kinds(made),
            "answers": [answer for _, answer in pairs],
            "scene": made.scene.as_dict(),
        }
        yield Sample(f"{split}-{index}", _turns(pairs, prefix=IMAGE_TOKEN), (png(draw_scene(made.scene, size)),), meta)


def question_samples(seed: int, split: str, num: int, size: int) -> Iterator[Sample]:
    """Yield pictures with one question each; ``meta`` has its kind and answer."""
    for index in range(num):
        made = make_scene(seed, split, index, questions=1)
        question = made.questions[0]
        meta = {"kind": question.kind, "answer": question.answer, "scene": made.scene.as_dict()}
        turns = _turns([(question.text, question.answer)], prefix=IMAGE_TOKEN)
        yield Sample(f"{split}-{index}", turns, (png(draw_scene(made.scene, size)),), meta)


def caption_samples(seed: int, split: str, num: int, size: int) -> Iterator[Sample]:
    """Yield captioned pictures of one shape each."""
    for index in range(num):
        scene = random_scene(random.Random(f"{seed}/{split}/{index}"), most=1)
        picture = png(draw_scene(scene, size))
        yield caption_sample(f"{split}-{index}", picture, caption(scene), {"scene": scene.as_dict()})


def text_samples(seed: int, split: str, num: int) -> Iterator[Sample]:
    """Yield conversations without a picture: the scene is told instead of shown, and the same questions follow."""
    for index in range(num):
        made = make_scene(seed, split, index, questions=len(ANSWERS))
        pairs = _questions_and_caption(made)
        told = describe(made.scene, random.Random(f"{seed}/{split}/{index}/told"))
        meta = {"kinds": _kinds(made), "answers": [answer for _, answer in pairs]}
        yield Sample(f"{split}-{index}", _turns(pairs, prefix=f"{told} "), (), meta)


def describe(scene: Scene, rng: random.Random) -> str:
    """The caption, and where some shapes lie from others."""
    related = [
        f"the {item.name} is {where} of the {other.name}."
        for item in scene.items
        for other in scene.items
        if (where := direction(item, other)) is not None and item.name != other.name
    ]
    return " ".join([caption(scene), *rng.sample(related, min(2, len(related)))])


def _questions_and_caption(made: SceneWithQuestions) -> list[tuple[str, str]]:
    return [(question.text, question.answer) for question in made.questions] + [(CAPTION_REQUEST, caption(made.scene))]


def _kinds(made: SceneWithQuestions) -> list[str]:
    return [question.kind for question in made.questions] + ["caption"]


def _turns(pairs: list[tuple[str, str]], *, prefix: str) -> tuple[Turn, ...]:
    """User and assistant turns of (question, answer) pairs; ``prefix`` opens the first."""
    turns = []
    for place, (question, answer) in enumerate(pairs):
        turns += [Turn("user", question if place else prefix + question), Turn("assistant", answer)]
    return tuple(turns)
