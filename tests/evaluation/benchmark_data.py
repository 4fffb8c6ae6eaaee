"""Tiny local copies of the benchmarks, in the hub's folders, file names, columns and types; the pictures are noise."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Picture

from hive_ds.evaluation.benchmarks.readings import MME_COGNITION, MME_PERCEPTION

TEXT = Value("string")
OTHER_WORDS = ("red", "two", "cat", "left", "wood", "sky", "bus", "ball", "rain", "tea")


def picture(seed: int) -> dict[str, Any]:
    """A picture as parquet files hold one."""
    noise = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Picture.fromarray(noise).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(path: Path, rows: list[dict[str, Any]], features: dict[str, Any], shards: int = 1) -> None:
    """Write ``rows`` to ``path``, in which {} is the number of the shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows, Features(features))
    for shard in range(shards):
        part = table.shard(shards, shard, contiguous=True)
        name = str(path).format(f"{shard:05}-of-{shards:05}")
        part.to_parquet(name)
        if "textvqa" in name:  # as other writers leave it: nothing says that the column holds images
            pq.write_table(pq.read_table(name).replace_schema_metadata(None), name)


def write_benchmarks(folder: Path) -> Path:
    """All of them; returns ``folder``."""
    _mme(folder / "MME")
    _gqa(folder / "GQA")
    _vqa(folder / "OK-VQA/data/val2014-{}.parquet", {"question_type": TEXT, "answer_type": TEXT})
    _vqa(folder / "textvqa/data/validation-{}.parquet", {"image_id": TEXT, "ocr_tokens": Sequence(TEXT)})
    _scienceqa(folder / "ScienceQA/ScienceQA-FULL/test-{}.parquet", without_image=2)
    _scienceqa(folder / "ScienceQA/ScienceQA-IMG/test-{}.parquet", without_image=0)
    _pope(folder / "POPE")
    return folder


def _mme(folder: Path) -> None:
    """Every category once, the first twice; the images of a pair are equal, its answers are yes and no."""
    rows = []
    for number, category in enumerate((*MME_PERCEPTION, *MME_COGNITION, MME_PERCEPTION[0])):
        for answer in ("Yes", "No"):
            question = f"Is the circle {'red' if answer == 'Yes' else 'blue'}? Please answer yes or no."
            about = {"question_id": f"{category}/{number:04}.png", "image": picture(number)}
            rows.append({**about, "question": question, "answer": answer, "category": category})
    names = {"question_id": TEXT, "image": Image(), "question": TEXT, "answer": TEXT, "category": TEXT}
    write(folder / "data/test-{}-a25dbe3b44c4fda6.parquet", rows, names, shards=2)


def _gqa(folder: Path) -> None:
    images = [{"id": f"n{number}", "image": picture(100 + number)} for number in range(3)]
    write(folder / "testdev_balanced_images/testdev-{}.parquet", images, {"id": TEXT, "image": Image()})
    rows = [
        {"id": f"2{number}", "imageId": f"n{number % 3}", "question": f"What is {word}?", "answer": answer}
        for number, (word, answer) in enumerate(
            [("this", "yes"), ("that", "no"), ("it", "red"), ("he", "dining table")]
        )
    ]
    names = dict.fromkeys(("id", "imageId", "question", "answer"), TEXT)
    write(folder / "testdev_balanced_instructions/testdev-{}.parquet", rows, names)


def _vqa(path: Path, more: dict[str, Any]) -> None:
    """Ten people's answers: one unanimous, a tie of twos (nobody can be fully right), "yes" from two, and articles."""
    answers = [
        ["red"] * 10,
        [word for word in OTHER_WORDS[:5] for _ in range(2)],
        ["yes", "Yes", *OTHER_WORDS[:8]],
        ["a ball", "the ball", "ball.", "Ball", *OTHER_WORDS[:6]],
    ]
    rows = []
    for number, given in enumerate(answers):
        row: dict[str, Any] = {"question_id": TEXT_IDS[number], "image": picture(200 + number)}
        row |= {"question": f"what is shown on sign {number}?", "answers": given}
        row |= {"image_id": f"i{number // 2}", "ocr_tokens": ["EXIT"], "question_type": "one", "answer_type": "other"}
        rows.append({name: row[name] for name in (*VQA_NAMES, *more)})
    write(path, rows, {**VQA_NAMES, **more})


TEXT_IDS = ("34602", "34603", "34604", "34605")
VQA_NAMES = {"question_id": TEXT, "image": Image(), "question": TEXT, "answers": Sequence(TEXT)}


def _scienceqa(path: Path, without_image: int) -> None:
    rows = []
    for number in range(3 + without_image):
        choices = ["the circle", "the square", "neither", "both"][: 2 + number % 3]
        rows.append(
            {
                "image": picture(300 + number) if number < 3 else None,
                "question": f"Which shape is number {number}?",
                "choices": choices,
                "answer": number % len(choices),
                "hint": "Look at the picture." if number % 2 else "",
                "subject": "natural science",
            }
        )
    names = {"image": Image(), "question": TEXT, "choices": Sequence(TEXT), "answer": Value("int8"), "hint": TEXT}
    write(path, rows, {**names, "subject": TEXT})


def _pope(folder: Path) -> None:
    rows = []
    for category in ("random", "popular", "adversarial"):
        for number in range(2):
            source = f"COCO_val2014_{number:012}"
            thing, answer = (("dog", "yes"), ("cat", "no"))[number]
            row = {
                "id": str(len(rows)),
                "question_id": str(number + 1),
                "question": f"Is there a {thing} in the image?",
            }
            row |= {"answer": answer, "image_source": source, "image": picture(400 + number), "category": category}
            rows.append(row)
    names: dict[str, Any] = dict.fromkeys(rows[0], TEXT)
    write(folder / "data/test-{}.parquet", rows, {**names, "image": Image()})
