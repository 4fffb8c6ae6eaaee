"""LLaVA JSON and an image folder -> MDS shards, with photographs that scikit-image ships."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import skimage
from tiny_data import make_image_processor, make_tokenizer, png

from hive_ds.config import DataConfig
from hive_ds.data.convert import ConversionSummary, convert_llava
from hive_ds.data.loader import build_loader
from hive_ds.data.sources import LlavaSource
from hive_ds.errors import HiveError

PHOTOS = {"astronaut": "astronaut.png", "coffee": "coffee.png", "camera": "camera.png"}


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


GOOD = [
    {"id": "one", "image": "astronaut.png", "conversations": talk("<image>\nWho is this?", "An astronaut.")},
    {"id": 2, "image": ["coffee.png", "sub/camera.png"], "conversations": talk("<image> or <image>?", "Coffee.")},
    {"image": "coffee.png", "conversations": talk("Describe it.", "A cup.", "More?", "On a table.")},
    {"id": "text", "conversations": talk("How many legs has a dog?", "Four.")},
]
BAD = {
    "broken": ({"image": "broken.png", "conversations": talk("<image>", "x")}, "broken.png: .*cannot be read"),
    "cut": ({"image": "cut.png", "conversations": talk("<image>", "x")}, "cut.png: .*cannot be read"),
    "missing": ({"image": "none.png", "conversations": talk("<image>", "x")}, "none.png: No such file"),
    "outside": ({"image": "../data.json", "conversations": talk("<image>", "x")}, "lies outside"),
    "folder": ({"image": "sub", "conversations": talk("<image>", "x")}, "Is a directory"),
    "null": ({"image": "a\0b", "conversations": talk("<image>", "x")}, "null"),
    "number": ({"image": 5, "conversations": talk("<image>", "x")}, "image 5: expected a path"),
    "count": ({"image": "coffee.png", "conversations": talk("<image><image>", "x")}, "2 <image> in the text, but 1"),
    "speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "speaker 'narrator'"),
    "value": ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "value None, expected text"),
    "silent": ({"conversations": talk("Hello?")}, "nothing to learn"),
    "empty": ({"conversations": []}, "no list of conversations"),
}


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Path]:
    """The JSON, good and bad samples mixed, and the folder."""
    images, shipped = tmp_path / "images", Path(skimage.__file__).parent / "data"
    (images / "sub").mkdir(parents=True)
    for name, file in PHOTOS.items():
        (images / ("sub" if name == "camera" else ".") / f"{name}.png").write_bytes((shipped / file).read_bytes())
    (images / "broken.png").write_bytes(b"GIF89a nothing")
    (images / "cut.png").write_bytes(png(size=(64, 64))[:60])
    bad = [{"id": name, **fields} for name, (fields, _) in BAD.items()]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*bad[:4], *GOOD, *bad[4:], "not a sample"]))
    return path, images


def test_conversion_keeps_the_good_and_names_the_bad(source: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shipped = [(Path(skimage.__file__).parent / "data" / file).stat().st_size for file in PHOTOS.values()]
    summary = convert_llava(*source, out)
    size = shipped[0] + 2 * shipped[1] + shipped[2]
    assert summary == ConversionSummary(str(out), len(GOOD), len(BAD) + 1, 4, size)
    assert json.loads((out / "summary.json").read_text()) == vars(summary)
    rejects = {line["id"]: line["reason"] for line in map(json.loads, (out / "rejects.jsonl").read_text().splitlines())}
    assert rejects.keys() == {*BAD, "entry-16"}
    for name, (_, reason) in BAD.items():
        assert re.search(reason, rejects[name]), name
    data = DataConfig(train="", validation=str(out), template="chat", num_workers=0, max_bad_share=0.0)
    sizes = {"micro_batch_size": 4, "global_batch_size": 4, "seed": 0}
    (batch,) = build_loader(data, make_tokenizer("llama2"), make_image_processor(), **sizes, train=False)
    assert batch.sample_ids == ["one", "2", "entry-6", "text"]
    assert [len(offsets) for offsets in batch.image_offsets] == [1, 2, 1, 0]


def test_images_without_placeholder_come_before_the_first_question(source: tuple[Path, Path]) -> None:
    entry = list(LlavaSource(*source))[6]
    assert entry.read().turns[0].content == "<image>\nDescribe it."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "LLaVA JSON .*: does not exist"),
        ("[", "is not JSON"),
        ('{"a": 1}', "holds a dict, expected a list"),
        ("[]", "the list is empty"),
        ("[{}, 3]", "all 2 samples were rejected; the first, entry-0: has no list of conversations"),
    ],
)
def test_useless_json_is_one_clear_error_and_leaves_nothing(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "images").mkdir()
    if text is not None:
        (tmp_path / "data.json").write_text(text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(HiveError, match=message):
        convert_llava(tmp_path / "data.json", tmp_path / "images", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_missing_image_folder_and_full_output_are_refused(source: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(HiveError, match=r"image folder .*nowhere: does not exist"):
        convert_llava(source[0], tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(HiveError, match="not an empty folder"):
        convert_llava(*source, tmp_path)
