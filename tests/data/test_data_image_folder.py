"""A folder of images with metadata files, as Hugging Face's ImageFolder has it, and what such a folder hides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from corpus import encoded, photo

from hive_ds.data.sources import Columns, SourceOptions, open_source
from hive_ds.errors import HiveError

IMAGES = {name: encoded(photo(seed=at), "png") for at, name in enumerate(("a.png", "train/b.png", "train/c.png"))}


def found(folder: Path) -> dict[str, list[str]]:
    """Caption, or why there is none, of every sample, by the image's path."""
    source = open_source(SourceOptions(str(folder)))
    answers: dict[str, list[str]] = {}
    for index in range(len(source)):
        name = source.sample_id(index)
        try:
            sample = source.read(index)
            assert sample.images == (IMAGES[name],) == source.images(index)
            answers.setdefault(name, []).append(sample.turns[1].content)
        except HiveError as error:
            answers.setdefault(name, []).append(str(error))
    return answers


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, data in IMAGES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_every_row_is_a_sample(tmp_path: Path) -> None:
    """Of a metadata file in any folder, whose names start there; ``./`` before a name changes nothing."""
    rows = '{"file_name": "./a.png", "text": "A."}\n{"file_name": "a.png", "text": "Again."}\n'
    below = "file_name,image,text\nb.png,,B.\nnone.png,,Gone.\n../a.png,,From below.\n"
    assert found(write(tmp_path, {"metadata.jsonl": rows, "train/metadata.csv": below})) == {
        "a.png": ["A.", "Again.", "From below."],
        "train/b.png": ["B."],
        "train/c.png": ["is not in the folder's metadata file"],
        "train/none.png": ["image train/none.png: No such file or directory"],
    }


def test_samples_stand_by_path_and_name_their_folder(tmp_path: Path) -> None:
    """Of two metadata files of one folder the first is read; another image makes another source."""
    rows = [f'{{"file_name": "{name}", "text": "{name}"}}\n' for name in reversed(IMAGES)]
    write(tmp_path, {"metadata.jsonl": "".join(rows), "metadata.csv": "file_name,text\na.png,Other.\n"})
    before = open_source(SourceOptions(str(tmp_path)))
    assert [before.read(at).turns[1].content for at in range(len(before))] == sorted(IMAGES)
    (tmp_path / "train" / "d.png").write_bytes(IMAGES["a.png"])
    after = open_source(SourceOptions(str(tmp_path)))
    assert {name for name in after.origin if after.origin[name] != before.origin[name]} == {"image names"}


@pytest.mark.parametrize("first", ["", "train/c.png,C\n"])
def test_a_comma_without_quotes_cuts_no_caption(first: str, tmp_path: Path) -> None:
    rows = f'file_name,text\n{first}a.png,A cat, sitting\ntrain/b.png,"B, too"\n'
    answers = found(write(tmp_path, {"metadata.csv": rows}))
    assert answers["a.png"] == ["has 3 fields; expected 2: quote a text that holds commas"]
    assert answers["train/b.png"] == ["B, too"]


def test_a_missing_text_is_not_the_folders_name(tmp_path: Path) -> None:
    """Nor one that is called otherwise; a folder without texts has its name for a caption."""
    write(tmp_path, {"a.txt": "A.", "train/b.txt": "B.", "train/c.TXT": "C.", "dogs/d.TXT": "D."})
    (tmp_path / "dogs" / "d.png").write_bytes(IMAGES["a.png"])
    source = open_source(SourceOptions(str(tmp_path)))
    assert [source.read(at).turns[1].content for at in (0, 1, 2)] == ["A.", "dogs", "B."]
    with pytest.raises(HiveError, match=r"^has no c\.txt beside it, as other images of its folder have$"):
        source.read(3)


@pytest.mark.parametrize("name", ["text", "image", "conversations"])
def test_a_column_of_no_metadata_file_is_missed(name: str, tmp_path: Path) -> None:
    """The names of class folders were taken for the captions asked for."""
    write(tmp_path, {"captions.csv": "file_name,florence\na.png,A.\n"})
    options = SourceOptions(str(tmp_path), "image_folder", columns=Columns(**{name: "florence"}))
    message = r"image folder .*: has no column 'florence'; expected a metadata\.jsonl or metadata\.csv with it$"
    with pytest.raises(HiveError, match=message):
        open_source(options)
    assert len(open_source(replace(options, columns=Columns(**{name: "florence"}, texts=False)))) == len(IMAGES)


def test_hidden_files_are_no_samples(tmp_path: Path) -> None:
    write(tmp_path, {name: "x" for name in (".checkpoints/a.png", "._a.png", "train/._b.png", "a.txt")})
    assert found(tmp_path) == {"a.png": ["x"], "train/b.png": ["train"], "train/c.png": ["train"]}


def test_a_photo_that_cannot_be_decoded_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {"train/phone.HEIC": "x"})
    assert open_source(SourceOptions(str(tmp_path))).sample_id(3) == "train/phone.HEIC"


def test_class_labels_are_captions_as_class_folders_are(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")
    for name in ("dog/b.png", "sea_lion/a.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        (tmp_path / "photos" / name).write_bytes(IMAGES["a.png"])
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), cache_dir=tmp_path, split="train")
    rows.save_to_disk(tmp_path / "saved")
    sources = [open_source(SourceOptions(str(tmp_path / name))) for name in ("photos", "saved")]
    as_folder, as_dataset = [[source.read(at).turns for at in range(len(source))] for source in sources]
    assert as_folder == as_dataset
    assert [answer.content for _, answer in as_folder] == ["dog", "sea lion"]

    rows.cast_column("label", datasets.Value("int64")).save_to_disk(tmp_path / "numbers")
    with pytest.raises(HiveError, match=r"column 'label' holds int64, expected text; name one of image, label with --"):
        open_source(SourceOptions(str(tmp_path / "numbers")))


def test_a_file_of_texts_beside_folders_of_images_is_not_passed_over(tmp_path: Path) -> None:
    """As LLaVA's own data sets lie: names of folders would be the captions."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "b.png").write_bytes(IMAGES["train/b.png"])
    (tmp_path / "train" / "more.json").write_text("{}")
    assert found(tmp_path) == {"train/b.png": ["train"]}
    (tmp_path / "blip_laion.json").write_text("[]")
    with pytest.raises(HiveError, match=r"holds blip_laion\.json; expected that file, .* or --format"):
        found(tmp_path)
    source = SourceOptions(str(tmp_path))
    assert len(open_source(replace(source, format="image_folder"))) == 1
    assert len(open_source(replace(source, columns=Columns(texts=False)))) == 1
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/b.png,A red square\n")
    assert found(tmp_path) == {"train/b.png": ["A red square"]}
