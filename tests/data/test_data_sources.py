"""Every source format gives the same samples; presets find their files; what is missing is named."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus import encoded, photo, talk

from hive_ds.data.schema import Sample, Turn
from hive_ds.data.sources import Columns, SourceOptions, open_source
from hive_ds.data.sources.base import conversation
from hive_ds.errors import HiveError

FILES = {f"{n}.jpg": encoded(photo(seed=n), "jpeg") for n in range(4)}
CAPTIONS = {name: f"Picture {name[0]}, with a comma and\na line." for name in FILES}


def expected() -> list[tuple[tuple[Turn, ...], tuple[bytes, ...]]]:
    return [
        ((Turn("user", "<image>"), Turn("assistant", CAPTIONS[name].strip())), (data,)) for name, data in FILES.items()
    ]


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def rows() -> list[dict[str, Any]]:
    return [{"id": name[0], "image": name, "caption": CAPTIONS[name]} for name in FILES]


def llava_folder(root: Path) -> SourceOptions:
    (root / "data.json").write_text(json.dumps(rows()))
    return SourceOptions(str(root / "data.json"), images=str(write_images(root / "images")))


def llava_lines_zip(root: Path) -> SourceOptions:
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()) + "\n")
    with zipfile.ZipFile(root / "images.zip", "w") as file:
        for name, data in FILES.items():
            file.writestr(f"images/{name}", data)
    return SourceOptions(str(root / "data.jsonl"), images=str(root / "images.zip"))


def llava_tar(root: Path) -> SourceOptions:
    (root / "data.json").write_text(json.dumps(rows()))
    with tarfile.open(root / "images.tar", "w") as tar:
        for name, data in FILES.items():
            add(tar, f"./{name}", data)
    return SourceOptions(str(root / "data.json"), images=str(root / "images.tar"))


def table(root: Path, suffix: str, header: bool) -> SourceOptions:
    write_images(root)
    with (root / f"data.{suffix}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
        if header:
            writer.writerow(["Caption", "Path"])  # as a spreadsheet may spell it
        for name, caption in CAPTIONS.items():
            writer.writerow([caption, name] if header else [name, caption])
    return SourceOptions(str(root / f"data.{suffix}"))


def webdataset(root: Path) -> SourceOptions:
    names = list(FILES)
    for number, part in enumerate((names[:2], names[2:])):
        with tarfile.open(root / f"{number:05d}.tar", "w") as tar:
            for name in part:
                add(tar, name, FILES[name])
                add(tar, f"{name[0]}.txt", CAPTIONS[name].encode())
                add(tar, f"{name[0]}.json", json.dumps({"caption": "alt", "florence": CAPTIONS[name]}).encode())
    return SourceOptions(str(root))


def image_folder(root: Path) -> SourceOptions:
    write_images(root)
    for name, caption in CAPTIONS.items():
        (root / name).with_suffix(".txt").write_text(caption)
    return SourceOptions(str(root))


def image_folder_metadata(root: Path) -> SourceOptions:
    write_images(root)
    lines = [json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in CAPTIONS.items()]
    (root / "metadata.jsonl").write_text("".join(lines))
    return SourceOptions(str(root))


def parquet(root: Path) -> SourceOptions:
    dataset().to_parquet(root / "train-00000.parquet")
    return SourceOptions(str(root))


def saved(root: Path) -> SourceOptions:
    dataset().save_to_disk(root / "saved")
    return SourceOptions(str(root / "saved"))


def dataset() -> Any:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")
    images = [{"bytes": data, "path": None} for data in FILES.values()]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "caption": list(CAPTIONS.values())}, features=features)


MAKERS: dict[str, Callable[[Path], SourceOptions]] = {
    "llava json, folder": llava_folder,
    "llava jsonl, zip": llava_lines_zip,
    "llava json, tar": llava_tar,
    "csv": lambda root: table(root, "csv", header=True),
    "tsv without header": lambda root: table(root, "tsv", header=False),
    "webdataset": webdataset,
    "image folder": image_folder,
    "image folder, metadata": image_folder_metadata,
    "parquet": parquet,
    "saved dataset": saved,
}


def read_all(options: SourceOptions, preset: str | None = None) -> list[Sample]:
    source = open_source(options, preset)
    samples = [source.read(index) for index in range(len(source))]
    assert [sample.id for sample in samples] == [source.sample_id(index) for index in range(len(source))]
    assert len({sample.id for sample in samples}) == len(samples)
    return samples


@pytest.mark.parametrize("name", MAKERS)
def test_every_format_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    samples = read_all(MAKERS[name](tmp_path))
    assert [(sample.turns, sample.images) for sample in samples] == expected()


def test_a_column_to_choose(tmp_path: Path) -> None:
    options = webdataset(tmp_path)
    for preset in (None, "cc3m"):
        chosen = SourceOptions(options.path, columns=Columns(text="florence"))
        assert [sample.turns for sample in read_all(chosen, preset)] == [turns for turns, _ in expected()]
    samples = read_all(SourceOptions(options.path, columns=Columns(text="caption")))
    assert {sample.turns[1].content for sample in samples} == {"alt"}


def test_conversations_with_several_images_and_without_any(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")
    files = list(FILES.values())
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "content": "Two pictures."},
    ]
    table = {
        "id": ["a", "b", "c"],
        "images": [[{"bytes": x, "path": None} for x in files[:2]], [], [{"bytes": files[2], "path": None}]],
        "messages": [json.dumps(chat), json.dumps(talk("Hi", "Hello")), json.dumps(talk("What?", "Noise."))],
    }
    features = datasets.Features({name: datasets.Value("string") for name in ("id", "messages")})
    features["images"] = datasets.Sequence(datasets.Image())
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "saved")
    two, none, one = read_all(SourceOptions(str(tmp_path / "saved")))
    assert two.images == tuple(files[:2])
    assert two.turns[0] == Turn("user", "Be brief.\n<image>\nWhat?<image>\n")
    assert (none.images, none.turns) == ((), (Turn("user", "Hi"), Turn("assistant", "Hello")))
    assert (one.images, one.turns[0].content) == ((files[2],), "<image>\nWhat?")


def test_a_system_message_waits_for_the_users_next_turn() -> None:
    """And is no part of an answer, which would be trained on."""
    late = {"from": "system", "value": "Be brief."}
    first, answer, *rest = talk("Hi", "Hello", "And?", "Yes")
    assert conversation([first, late, answer, *rest]) == [
        Turn("user", "Hi"),
        Turn("assistant", "Hello"),
        Turn("user", "Be brief.\nAnd?"),
        Turn("assistant", "Yes"),
    ]


def test_class_folders_are_captions(tmp_path: Path) -> None:
    write_images(tmp_path / "sea_lion")
    write_images(tmp_path / "dog")
    samples = read_all(SourceOptions(str(tmp_path)))
    assert [sample.turns[1].content for sample in samples] == ["dog"] * 4 + ["sea lion"] * 4


@pytest.mark.parametrize("preset", ["llava-pretrain", "sharegpt4v", "llava-next"])
def test_presets_find_their_files(preset: str, tmp_path: Path) -> None:
    if preset == "llava-next":
        datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")
        data = {
            "id": ["a", "b"],
            "image": [{"bytes": FILES["0.jpg"], "path": "0.jpg"}, None],
            "conversations": [talk("<image>\nWhat?", "Noise."), talk("Hi", "Hello")],
            "data_source": ["x", "y"],
        }
        built = datasets.Dataset.from_dict(data).cast_column("image", datasets.Image())
        built.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
        samples = read_all(SourceOptions(str(tmp_path)), preset)
        assert [len(sample.images) for sample in samples] == [1, 0]
        return
    names = {
        "llava-pretrain": ("blip_laion_cc_sbu_558k.json", "images", "0.jpg"),
        "sharegpt4v": ("sharegpt4v_instruct_gpt4-vision_cap100k.json", "data/coco/train2017", "coco/train2017/0.jpg"),
    }
    file, folder, image = names[preset]
    write_images(tmp_path / folder)
    (tmp_path / file).write_text(
        json.dumps([{"id": "x", "image": image, "conversations": talk("What?\n<image>", "N.")}])
    )
    (sample,) = read_all(SourceOptions(str(tmp_path)), preset)
    assert sample.images == (FILES["0.jpg"],)
    (tmp_path / file).unlink()
    with pytest.raises(HiveError, match=f"preset {preset}: .* holds none of .*{file}"):
        open_source(SourceOptions(str(tmp_path)), preset)


def test_a_tar_that_was_cut_short_gives_its_whole_members(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    webdataset(tmp_path)
    tar = tmp_path / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: whole.index(FILES["3.jpg"]) + 100])
    samples = read_all(SourceOptions(str(tmp_path)))
    assert [sample.images[0] for sample in samples] == [FILES[name] for name in ("0.jpg", "1.jpg", "2.jpg")]
    assert "00001.tar is cut short" in caplog.text


WRONG: dict[str, tuple[Callable[[Path], SourceOptions], str]] = {
    "nothing there": (
        lambda root: SourceOptions(str(root / "none")),
        "none: no such file or folder; expected a file, a",
    ),
    "no JSON": (lambda root: written(root, "a.json", "{"), "a.json: is not JSON"),
    "JSON nested without end": (lambda root: written(root, "a.json", "[" * 10**6), "a.json: is not JSON"),
    "no list": (lambda root: written(root, "a.json", "{}"), "holds a dict, expected a list"),
    "empty list": (lambda root: written(root, "a.json", "[]"), "the list is empty"),
    "empty lines": (lambda root: written(root, "a.jsonl", "\n"), "holds no line"),
    "empty table": (lambda root: written(root, "a.csv", ""), "table .*a.csv: holds no row"),
    "no text": (
        lambda root: written(root, "a.jsonl", '{"image": "x", "b": 1}'),
        "has no column of text; name one of",
    ),
    "no such column": (
        lambda root: written(root, "a.jsonl", '{"caption": "x"}', columns=Columns(text="florence")),
        "has no column 'florence'; it has caption, image",
    ),
    "no images": (lambda root: SourceOptions(str(root)), "image folder .*: holds no image"),
    "not a tar": (lambda root: written(root, "a.tar", "x" * 2000), "a.tar: is no uncompressed tar"),
    "images to spare": (lambda root: SourceOptions(webdataset(root).path, images="x"), "holds its images itself"),
    "images that no column names": (
        lambda root: written(root, "a.csv", "picture_file,title\nx.png,hello\n", images=str(root)),
        "has no column of images; name one of picture_file, title with --image-column",
    ),
    "table without images": (
        lambda root: written(root, "a.csv", "picture_file,title\nx.png,hello\n"),
        "no column of images; name one of picture_file, title with --image-column, or none for text alone",
    ),
    "images that no field names": (
        lambda root: written(root, "a.json", '[{"picture_file": "x.png", "caption": "hello"}]', images=str(root)),
        "no image in its first rows, whose fields are picture_file, caption; name",
    ),
    "format, with images": (
        lambda root: SourceOptions(str(root), format="tabel", images=str(root)),
        "source format 'tabel': expected one of llava",
    ),
    "format": (lambda root: SourceOptions(str(root), format="zip"), "source format 'zip': expected one of llava"),
}


def written(root: Path, name: str, text: str, **options: Any) -> SourceOptions:
    (root / name).write_text(text)
    return SourceOptions(str(root / name), **options)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_source_is_named(name: str, tmp_path: Path) -> None:
    make, message = WRONG[name]
    options = make(tmp_path)
    with pytest.raises(HiveError, match=message):
        open_source(options)
    with pytest.raises(HiveError, match=r"preset 'cc4m': expected one of cc3m, llava-pretrain"):
        open_source(options, "cc4m")


def test_a_table_of_text_alone_is_asked_for(tmp_path: Path) -> None:
    options = written(tmp_path, "a.csv", "question,text\nWho?,Nobody.\n", columns=Columns(image="none"))
    (sample,) = read_all(options)
    assert (sample.images, sample.turns) == ((), (Turn("user", ""), Turn("assistant", "Nobody.")))


def test_a_table_as_open_clip_has_it(tmp_path: Path) -> None:
    write_images(tmp_path)
    (sample,) = read_all(written(tmp_path, "a.csv", "filepath,title\n0.jpg,Noise.\n"))
    assert (sample.images, sample.turns[1].content) == ((FILES["0.jpg"],), "Noise.")


def test_images_are_found_under_every_usual_name(tmp_path: Path) -> None:
    """A first row without one hides none of them."""
    photo(seed=0).save(tmp_path / "x.png")
    for name in ("file_name", "Image"):
        rows = [{"caption": "text alone"}, {name: "x.png", "caption": "hello"}]
        source = open_source(written(tmp_path, "a.json", json.dumps(rows), images=str(tmp_path)))
        assert [len(source.images(index)) for index in range(2)] == [0, len(source.read(1).images)] == [0, 1]
