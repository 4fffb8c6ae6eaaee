"""Rows that differ from their neighbours, and datasets as others save them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from corpus import encoded, photo, talk

from hive_ds.data.sources import SourceOptions, open_source
from hive_ds.data.sources.base import Columns
from hive_ds.errors import HiveError

IMAGES = [encoded(photo(seed=at), "png") for at in range(3)]


def test_rows_that_call_their_images_otherwise_keep_them(tmp_path: Path) -> None:
    """As in a mixture of two files: without a placeholder in the text, they became text alone."""
    for at, data in enumerate(IMAGES):
        (tmp_path / f"{at}.png").write_bytes(data)
    fields: list[dict[str, Any]] = [
        {"image": "0.png"},
        {"images": ["1.png", "2.png"]},
        {"image": None, "Images": ["2.png"]},
        {"path": "0.png"},
    ]
    (tmp_path / "a.JSONL").write_text(
        "".join(json.dumps({**row, "conversations": talk("Q", "A")}) + "\n" for row in fields)
    )
    for columns, expected in (
        (Columns(), [IMAGES[:1], IMAGES[1:], IMAGES[2:], []]),
        (Columns(image="image"), [IMAGES[:1], [], [], []]),
        (Columns(image="none"), [[], [], [], []]),
    ):
        source = open_source(SourceOptions(str(tmp_path / "a.JSONL"), images=str(tmp_path), columns=columns))
        assert [list(source.read(at).images) for at in range(4)] == expected
        assert [list(source.images(at)) for at in range(4)] == expected


def test_lines_end_and_begin_as_they_like(tmp_path: Path) -> None:
    """As programs of Windows write them; a row without an id is called by its number."""
    ids = ["a", "", None, 7]
    rows = [json.dumps({"id": id, "image": "x.png", "caption": f"Of {id}."}) for id in ids]
    (tmp_path / "a.jsonl").write_bytes(f"{rows[0]}\r\n\r\n  {rows[1]}  \r\n{rows[2]}\n \n{rows[3]}".encode())
    (tmp_path / "x.png").write_bytes(IMAGES[0])
    source = open_source(SourceOptions(str(tmp_path / "a.jsonl"), images=str(tmp_path)))
    assert [source.sample_id(at) for at in range(len(source))] == ["a", "entry-1", "entry-2", "7"]
    assert [source.read(at).turns[1].content for at in range(4)] == [f"Of {id}." for id in ids]


def test_images_of_a_field_of_any_name_are_taken_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(IMAGES[0])
    (tmp_path / "a.json").write_text(json.dumps([{"foto": "x.png", "caption": "A cat."}]))
    named = SourceOptions(str(tmp_path / "a.json"), images=str(tmp_path), columns=Columns(image="foto"))
    assert open_source(named).read(0).images == (IMAGES[0],)


def test_what_a_row_holds_besides_changes_nothing(tmp_path: Path) -> None:
    """A caption beside a conversation is none of it, nor a system prompt that is no text."""
    for at, data in enumerate(IMAGES):
        (tmp_path / f"{at}.png").write_bytes(data)
    both = {"caption": "Not this.", "conversations": talk("Q", "A")}
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Q"}]
    answer = {"role": "assistant", "content": "A"}
    rows = [
        {"uid": "u", "id": "first", "Image": "1.png", "image": "0.png", **both},
        {"id": "text", "image": "", "system": {"no": "text"}, **both},
        {"id": "parts", "image": "0.png", "conversations": [{"role": "user", "content": parts}, answer]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = open_source(SourceOptions(str(tmp_path / "a.json"), images=str(tmp_path)))
    assert [(sample.id, sample.images, sample.turns[0].content) for sample in map(source.read, range(3))] == [
        ("first", (IMAGES[1],), "<image>\nQ"),
        ("text", (), "Q"),
        ("parts", (IMAGES[0],), "<image>\nQ"),
    ]


def test_a_caption_shows_no_image(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(IMAGES[0])
    (tmp_path / "a.json").write_text(json.dumps([{"image": "0.png", "caption": ["<image> A <image> cat", "Other"]}]))
    source = open_source(SourceOptions(str(tmp_path / "a.json"), images=str(tmp_path)))
    assert [turn.content for turn in source.read(0).turns] == ["<image>", "A   cat"]


def test_a_system_prompt_beside_a_conversation_is_part_of_it(tmp_path: Path) -> None:
    """As ShareGPT's files have it; it reads as a system message does."""
    system = {"from": "system", "value": "Be brief."}
    rows = [{"system": "Be brief.", "conversations": talk("Q", "A")}, {"conversations": [system, *talk("Q", "A")]}]
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"system": "", "conversations": talk("Q", "A")}]))
    source = open_source(SourceOptions(str(tmp_path / "a.json")))
    beside, inside, none = (source.read(at).turns for at in range(3))
    assert beside == inside
    assert [turns[0].content for turns in (beside, none)] == ["Be brief.\nQ", "Q"]


def test_a_conversation_about_a_video_is_no_text(tmp_path: Path) -> None:
    rows = [{"image": None}, {"video": "a.mp4"}]
    (tmp_path / "a.json").write_text(json.dumps([{**row, "conversations": talk("<video>\nQ", "A")} for row in rows]))
    source = open_source(SourceOptions(str(tmp_path / "a.json")))
    assert source.read(0).images == ()
    with pytest.raises(HiveError, match=r"^shows the video a\.mp4; expected images$"):
        source.read(1)


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_caption_of_no_image_is_text_where_that_is_asked_for(kind: str, tmp_path: Path) -> None:
    """A table that lacks the path of a picture became text alone, and its caption was learned without it."""
    path, rows = tmp_path / f"a.{kind}", {"image": [None, "0.png"], "caption": ["A cat.", "A dog."]}
    (tmp_path / "0.png").write_bytes(IMAGES[0])
    if kind == "csv":
        path.write_text("image,caption\n,A cat.\n0.png,A dog.\n")
    elif kind == "json":
        path.write_text(json.dumps([{"caption": "A cat."}, {"image": "0.png", "caption": "A dog."}]))
    else:
        datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")
        datasets.Dataset.from_dict(rows).to_parquet(path)
    given = SourceOptions(str(path), images=str(tmp_path))
    with pytest.raises(HiveError, match=r"^has a caption and no image; --image-column none if text alone is meant$"):
        open_source(given).read(0)
    assert open_source(given).read(1).images == (IMAGES[0],)
    alone = open_source(replace(given, columns=Columns(image="none")))
    assert [(alone.read(at).images, alone.read(at).turns[1].content) for at in (0, 1)] == [
        ((), "A cat."),
        ((), "A dog."),
    ]


def test_links_in_a_folder_of_images_are_followed(tmp_path: Path) -> None:
    """As sets of pictures that lie elsewhere are put into one folder; a name that leaves the folder is refused."""
    for folder in ("elsewhere/coco", "images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "elsewhere" / "coco" / "0.png").write_bytes(IMAGES[0])
    (tmp_path / "elsewhere" / "1.png").write_bytes(IMAGES[1])
    (tmp_path / "images" / "coco").symlink_to(tmp_path / "elsewhere" / "coco")
    (tmp_path / "images" / "2.png").symlink_to("2.png")
    names = [
        "coco/0.png",
        str(tmp_path / "images" / "coco" / "0.png"),
        "../elsewhere/1.png",
        "coco/../../elsewhere/1.png",
    ]
    names += [str(tmp_path / "elsewhere" / "1.png"), "coco/../1.png", "2.png"]
    (tmp_path / "a.json").write_text(json.dumps([{"image": name, "caption": "A cat."} for name in names]))
    source = open_source(SourceOptions(str(tmp_path / "a.json"), images=str(tmp_path / "images")))
    assert [source.read(at).images for at in range(2)] == [(IMAGES[0],)] * 2
    reasons = ["lies outside"] * 3 + ["No such file or directory", "Too many levels of symbolic links"]
    for at, reason in enumerate(reasons, start=2):
        with pytest.raises(HiveError, match=reason):
            source.read(at)
    (tmp_path / "images" / "2.png").unlink()
    found = open_source(SourceOptions(str(tmp_path / "images")))
    assert [found.read(at).turns[1].content for at in range(len(found))] == ["coco"]


def test_a_path_that_goes_another_way_to_the_folder_is_inside(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(IMAGES[0])
    (tmp_path / "link").symlink_to("images")
    for name, folder in (("link", "images"), ("images", "link")):
        (tmp_path / "a.json").write_text(json.dumps([{"image": str(tmp_path / name / "0.png"), "caption": "A cat."}]))
        source = open_source(SourceOptions(str(tmp_path / "a.json"), images=str(tmp_path / folder)))
        assert source.images(0) == (IMAGES[0],)


def test_a_preset_needs_no_texts_where_they_are_given_otherwise(tmp_path: Path) -> None:
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text(json.dumps([{"id": "1", "image": "0.png"}]))
    (tmp_path / "0.png").write_bytes(IMAGES[0])
    source = open_source(SourceOptions(str(tmp_path), columns=Columns(texts=False)), "llava-pretrain")
    assert source.images(0) == (IMAGES[0],)
    with pytest.raises(HiveError, match="has no column of text"):
        open_source(SourceOptions(str(tmp_path)), "llava-pretrain")


@pytest.mark.parametrize("kind", ["llava", "table", "webdataset", "image_folder"])
def test_an_option_that_a_source_has_no_use_for_is_refused(kind: str, tmp_path: Path) -> None:
    """``--split train`` for a folder of train/ and test/ took both."""
    with pytest.raises(HiveError, match=rf"split 'train': a source of format {kind} has none"):
        open_source(SourceOptions(str(tmp_path), format=kind, split="train"))
    if kind in ("webdataset", "image_folder"):
        with pytest.raises(HiveError, match=rf"id column 'uid': a source of format {kind} names its samples by their"):
            open_source(SourceOptions(str(tmp_path), format=kind, columns=Columns(id="uid")))


def test_a_file_of_an_unknown_kind_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(HiveError, match=r"a\.tar\.gz: a file of unknown kind; expected \.json, \.jsonl, \.csv"):
        open_source(SourceOptions(str(tmp_path / "a.tar.gz")))


def dataset() -> Any:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")
    message = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = {"image": datasets.Image(), "conversations": [message], "id": datasets.Value("int64")}
    columns = {
        "image": [{"bytes": data, "path": None} for data in IMAGES],
        "conversations": [talk("<image>Q", f"A{at}") for at in range(3)],
        "id": [10**16 + at for at in range(3)],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("format", ["numpy", "torch", "pandas", "arrow"])
def test_a_saved_format_changes_nothing(format: str, tmp_path: Path) -> None:
    """`save_to_disk` keeps what `with_format` said: ids were ``tensor(1)``, conversations arrays."""
    dataset().with_format(format, columns=["image", "id"]).save_to_disk(tmp_path / "saved")
    source = open_source(SourceOptions(str(tmp_path / "saved")))
    samples = [source.read(at) for at in range(3)]
    assert (
        [sample.id for sample in samples]
        == [source.sample_id(at) for at in range(3)]
        == [f"{10**16 + at}" for at in range(3)]
    )
    assert [sample.turns[1].content for sample in samples] == ["A0", "A1", "A2"]
    assert [sample.images for sample in samples] == [(data,) for data in IMAGES]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_dataset_written_anew_is_another_source(kind: str, tmp_path: Path) -> None:
    """Also in place, which its folder does not tell: a conversion begun with the old one does not go on."""
    (tmp_path / "a").mkdir()
    if kind == "saved":
        dataset().save_to_disk(tmp_path / "a", num_shards=2)
    else:
        for name in ("0.parquet", "1.parquet"):
            dataset().to_parquet(tmp_path / "a" / name)
    origins = [open_source(SourceOptions(str(tmp_path / "a"))).origin for _ in range(2)]
    assert origins[0] == origins[1]
    files = [file for file in (tmp_path / "a").iterdir() if file.suffix in (".parquet", ".arrow")]
    assert len(files) == 2
    for file in files:
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        origins.append(open_source(SourceOptions(str(tmp_path / "a"))).origin)
        differ = {name for name, value in origins[-1].items() if value != origins[-2][name]}
        assert differ == {"source files"}


def test_conversations_and_images_by_field_are_the_same(tmp_path: Path) -> None:
    """`datasets` turns a Sequence of structs into a struct of lists."""
    rows = dataset()
    rows.save_to_disk(tmp_path / "list")
    datasets = pytest.importorskip("datasets")
    message = datasets.Sequence({"from": datasets.Value("string"), "value": datasets.Value("string")})
    by_field = [{key: [turn[key] for turn in turns] for key in ("from", "value")} for turns in rows["conversations"]]
    rows = rows.remove_columns(["conversations", "image"]).add_column("conversations", by_field)
    rows = rows.cast_column("conversations", message)
    images = [{"bytes": [data], "path": [None]} for data in IMAGES]
    image = datasets.Sequence({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    rows.add_column("image", images).cast_column("image", image).save_to_disk(tmp_path / "sequence")
    sources = [open_source(SourceOptions(str(tmp_path / name))) for name in ("sequence", "list")]
    sequence, listed = ([source.read(at) for at in range(3)] for source in sources)
    assert sequence == listed


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (
            (
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ),
            [0, 1],
        ),
        (("train/0.parquet", "train/1.parquet", "val/0.parquet"), [0, 1]),
        (("eval_suite/train-0.parquet", "eval_suite/train-1.parquet", "eval_suite/test-0.parquet"), [0, 1]),
        (("0.parquet", "1.parquet", "speed-test.parquet"), [0, 1, 2]),
        (("data/train-00000-of-00001.parquet", "data/contrast-00000-of-00001.parquet"), [0]),
        (("pretrain-00000-of-00002.parquet", "pretrain-00001-of-00002.parquet"), [0, 1]),
    ],
)
def test_test_images_are_not_trained_on(
    names: tuple[str, ...], found: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder as the hub has it: its files name splits, of which "train" is taken."""
    rows = dataset()
    for at, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows.select([at]).to_parquet(tmp_path / name)
    source = open_source(SourceOptions(str(tmp_path)))
    assert [source.images(at) for at in range(len(source))] == [(IMAGES[at],) for at in found]
    assert ("takes split 'train' of " in caplog.text) == (len(found) < len(names))
    if len(found) < len(names):
        split = next(split for split in ("test", "validation", "contrast") if split[:3] in names[-1])
        held_out = open_source(SourceOptions(str(tmp_path), split=split))
        assert (len(held_out), held_out.images(0)) == (1, (IMAGES[len(found)],))
        assert caplog.text.count("takes split") == 1, "said where one is asked for"


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1]*").mkdir()
    for folder in ("a[1]*", "."):
        file = tmp_path / folder / "b[2].parquet"
        dataset().to_parquet(file)
        for path in (file, file.parent):
            assert len(open_source(SourceOptions(str(path), format="huggingface"))) == (6 if path == tmp_path else 3)


def test_an_image_of_neither_bytes_nor_path_is_called_so(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")
    import pyarrow
    import pyarrow.parquet

    nothing = {"bytes": None, "path": None}
    pyarrow.parquet.write_table(pyarrow.table({"image": [nothing], "text": ["A cat."]}), tmp_path / "a.parquet")
    with pytest.raises(HiveError, match=r"^image holds neither bytes nor a path$"):
        open_source(SourceOptions(str(tmp_path / "a.parquet"))).read(0)
