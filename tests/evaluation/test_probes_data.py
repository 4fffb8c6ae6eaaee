"""Every form of a data set gives the same images and labels; splits are what they say; what is missing is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_data import labelled, noise_png

from hive_ds.data.scenes import all_questions, make_scene, random_scene
from hive_ds.data.scenes_samples import caption_samples, scene_samples, text_samples
from hive_ds.errors import HiveError
from hive_ds.evaluation.probes.data import TASK, LabelledImages, ProbeData, hold_out
from hive_ds.evaluation.probes.presets import PRESETS
from hive_ds.evaluation.probes.scene_factors import FACTORS, scene_factors, scene_probe_data
from hive_ds.evaluation.probes.sources import DataOptions, open_data

TRAIN = [(noise_png(n), ("cat", "dog")[n % 2]) for n in range(6)]
TEST = [(noise_png(n), ("cat", "dog")[n % 2]) for n in range(10, 14)]


def write_classes(folder: Path, rows: list[tuple[bytes, str]]) -> Path:
    for number, (data, label) in enumerate(rows):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number}.png").write_bytes(data)
    return folder


def table(rows: list[tuple[bytes, str]], image: str = "image", label: str = "label", *, names: bool = True):
    feature = datasets.ClassLabel(names=["cat", "dog"]) if names else datasets.Value("string")
    features = datasets.Features({image: datasets.Image(), label: feature, "id": datasets.Value("int64")})
    columns = {image: [{"bytes": data, "path": None} for data, _ in rows], label: [name for _, name in rows]}
    return datasets.Dataset.from_dict({**columns, "id": list(range(len(rows)))}, features=features)


def class_folders(root: Path) -> DataOptions:
    write_classes(root / "train", TRAIN)
    write_classes(root / "val", TEST)
    (root / "val" / "cat" / "notes.txt").write_text("no image")
    (root / "val" / "cat" / "._10.png").write_bytes(b"Mac OS X")
    for part in ("train", "val"):
        write_classes(root / part, [(noise_png(0), ".ipynb_checkpoints")])
    return DataOptions(str(root))


def saved(root: Path) -> DataOptions:
    datasets.DatasetDict({"train": table(TRAIN), "validation": table(TEST)}).save_to_disk(str(root / "saved"))
    return DataOptions(str(root / "saved"))


def saved_with_other_names(root: Path) -> DataOptions:
    parts = {"first": table(TRAIN, "picture", "animal", names=False), "second": table(TEST, "picture", "animal")}
    for name, part in parts.items():
        part.save_to_disk(str(root / "saved" / name))
    (root / "saved" / "dataset_dict.json").write_text('{"splits": ["first", "second"]}')
    return DataOptions(str(root / "saved"), None, "first", "second", "picture", "animal")


def hub_layout(root: Path) -> DataOptions:
    (root / "copy" / "data").mkdir(parents=True)
    table(TRAIN[:4]).to_parquet(root / "copy" / "data" / "train-00000-of-00002.parquet")
    table(TRAIN[4:]).to_parquet(root / "copy" / "data" / "train-00001-of-00002.parquet")
    table(TEST).to_parquet(root / "copy" / "data" / "validation-00000-of-00001.parquet")
    table(TEST).to_parquet(root / "copy" / "data" / "contrast-00000-of-00001.parquet")
    (root / "copy" / "test-notes.txt").write_text("no images")
    return DataOptions(str(root / "copy"), preset="food101")


def preset_columns(root: Path) -> DataOptions:
    parts = {"train": table(TRAIN, "img", "fine_label"), "test": table(TEST, "img", "fine_label")}
    datasets.DatasetDict(parts).save_to_disk(str(root / "saved"))
    return DataOptions(str(root / "saved"), preset="cifar100")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def rows_of(images: LabelledImages) -> list[tuple[bytes, str | None]]:
    return [(images.read(index), images.labels[TASK][index]) for index in range(images.size)]


@pytest.mark.parametrize("make", [class_folders, saved, saved_with_other_names, hub_layout, preset_columns])
def test_every_form_gives_the_same(make: Callable[[Path], DataOptions], tmp_path: Path) -> None:
    options = make(tmp_path)
    data, again = open_data(options), open_data(options)
    assert sorted(rows_of(data.train)) == sorted(TRAIN)
    assert sorted(rows_of(data.test)) == sorted(TEST)
    (task,) = data.tasks()
    assert task.classes == ("cat", "dog")
    for images, same in ((data.train, again.train), (data.test, again.test)):
        assert images.fingerprint == same.fingerprint
    assert data.train.fingerprint != data.test.fingerprint
    split = data.split(task, 0)
    assert len(split.train_rows) == 6
    assert len(split.test_rows) == 4


def test_a_folder_goes_before_the_preset_of_its_name(tmp_path: Path, monkeypatch) -> None:
    class_folders(tmp_path / "food101")
    monkeypatch.chdir(tmp_path)
    for preset in (None, "food101"):
        assert sorted(rows_of(open_data(DataOptions("food101", preset)).train)) == sorted(TRAIN)
    loaded = []
    monkeypatch.setattr(
        "hive_ds.evaluation.probes.sources.load_splits",
        lambda name, **_: loaded.append(name) or {"train": table(TRAIN), "test": table(TEST)},
    )
    assert open_data(DataOptions("oxford_pets")).train.name == "oxford_pets train"
    assert loaded == ["timm/oxford-iiit-pet"]


def test_without_test_images_each_seed_holds_out_its_own(tmp_path: Path) -> None:
    write_classes(tmp_path / "folders", [(noise_png(n), ("cat", "dog")[n % 2]) for n in range(40)])
    table(TRAIN).to_parquet(tmp_path / "one.parquet")
    assert open_data(DataOptions(str(tmp_path / "one.parquet"))).test is None
    data = open_data(DataOptions(str(tmp_path / "folders"), test_share=0.25))
    (task,) = data.tasks()
    splits = [data.split(task, seed) for seed in (0, 0, 1)]
    for split in splits:
        assert sorted([*split.train_rows, *split.test_rows]) == list(range(40))
        assert np.bincount(split.test_labels).tolist() == [5, 5]
        assert split.test_labels.tolist() == task.train[split.test_rows].tolist()
    assert splits[0].test_rows.tolist() == splits[1].test_rows.tolist() != splits[2].test_rows.tolist()
    assert open_data(replace(saved(tmp_path), test_split="none")).test is None
    write_classes(tmp_path / "alone" / "train", TRAIN)
    assert [task.classes for task in open_data(DataOptions(str(tmp_path / "alone"))).tasks()] == [("cat", "dog")]
    write_classes(tmp_path / "vehicles", [(data, {"cat": "car", "dog": "train"}[label]) for data, label in TRAIN])
    assert [task.classes for task in open_data(DataOptions(str(tmp_path / "vehicles"))).tasks()] == [("car", "train")]


def test_fingerprints_follow_the_images(tmp_path: Path) -> None:
    options = class_folders(tmp_path / "folders")
    before = open_data(options)
    (tmp_path / "folders" / "train" / "cat" / "0.png").write_bytes(noise_png(77))
    after = open_data(options)
    assert after.train.fingerprint != before.train.fingerprint
    assert after.test.fingerprint == before.test.fingerprint
    for name, rows in (("a", TRAIN), ("b", [(noise_png(77), "cat"), *TRAIN[1:]])):
        table(rows).to_parquet(tmp_path / f"{name}.parquet")
    found = [open_data(DataOptions(str(tmp_path / f"{name}.parquet"))).train.fingerprint for name in "ab"]
    assert found[0] != found[1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.05, 0.95), st.integers(0, 99))
def test_hold_out_is_a_split_by_class(labels: list[int], share: float, seed: int) -> None:
    kept, held = hold_out(np.array(labels), share, seed)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for number in set(labels):
        count, out = labels.count(number), sum(labels[row] == number for row in held)
        assert 1 <= out < count if count > 1 else out == 0
        assert abs(out - share * count) <= 1
    assert hold_out(np.array(labels), share, seed)[1].tolist() == held.tolist()


def one_class(root: Path) -> DataOptions:
    return DataOptions(str(write_classes(root, [row for row in TRAIN if row[1] == "cat"])))


def empty_split(root: Path) -> DataOptions:
    test = datasets.Dataset.from_dict({"image": [], "label": []})
    datasets.DatasetDict({"train": table(TRAIN), "test": test}).save_to_disk(str(root))
    return DataOptions(str(root))


def hidden_labels(root: Path) -> DataOptions:
    """ImageNet's test images have -1."""
    test = table(TEST).remove_columns("label").add_column("label", [-1] * 4)
    datasets.DatasetDict({"train": table(TRAIN), "test": test}).save_to_disk(str(root))
    return DataOptions(str(root))


def empty_folder(root: Path) -> DataOptions:
    write_classes(root / "train", TRAIN)
    (root / "test").mkdir()
    return DataOptions(str(root))


def absent(split: str) -> Callable[[Path], DataOptions]:
    def make(root: Path) -> DataOptions:
        cats = [row for row in TRAIN if row[1] == "cat"]
        for name in ("train", "test"):
            write_classes(root / name, cats if name == split else TRAIN)
            write_classes(root / name, [(noise_png(50), "owl")])
        return DataOptions(str(root))

    return make


def lone_image(root: Path) -> DataOptions:
    return DataOptions(str(write_classes(root, [*TRAIN, (noise_png(9), "owl")])))


def wrong(**changes: str) -> Callable[[Path], DataOptions]:
    return lambda root: replace(saved(root), **changes)


def no_label_column(root: Path) -> DataOptions:
    table(TRAIN).remove_columns("label").save_to_disk(str(root))
    return DataOptions(str(root))


def labels_of_floats(root: Path) -> DataOptions:
    table(TRAIN).remove_columns("label").add_column("label", [0.5] * 6).save_to_disk(str(root))
    return DataOptions(str(root))


WRONG = {
    "one class": (one_class, "'label' has one class, 'cat'; expected at least 2"),
    "empty split": (empty_split, "does not load|holds no image"),  # datasets reads one in version 3 alone
    "hidden labels": (hidden_labels, "test: no image has a label of 'label'"),
    "empty folder": (empty_folder, r"test holds no CLASS/IMAGE"),
    "class not in the test images": (absent("test"), "test: has no image of class 'dog'"),
    "class not in the training images": (absent("train"), "train: has no image of class 'dog'"),
    "class of one image": (lone_image, "class 'owl' of 'label' has one image"),
    "no such folder": (lambda root: DataOptions(str(root / "none")), "none: no such file or folder"),
    "no such split": (wrong(test_split="tset"), "has no split 'tset'; name one of train, validation"),
    "the same split": (wrong(train_split="validation"), "cannot be both"),
    "no such column": (wrong(label_column="lable"), "has no label column 'lable'; name one of image, label, id"),
    "no column": (no_label_column, "has no label column; name one of image, id with --label-column"),
    "labels of floats": (labels_of_floats, "column 'label' holds 0.5, expected a class's name or number"),
    "no such preset": (wrong(preset="food"), "preset 'food': expected one of food101"),
    "columns of a folder": (
        lambda root: DataOptions(class_folders(root).source, label_column="label"),
        "folder of class folders, which have no columns",
    ),
    "test share": (lambda root: replace(lone_image(root), test_share=1.0), "test share 1.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_named(case: str, tmp_path: Path) -> None:
    make, expected = WRONG[case]
    options = make(tmp_path)
    with pytest.raises(HiveError, match=expected):
        split_of(options)


def split_of(options: DataOptions) -> None:
    data = open_data(options)
    data.split(*data.tasks(), 0)


def test_labels_that_do_not_apply_are_left_out() -> None:
    images = labelled("six", 6, classes=("a", "b", "c"))
    labels = {"half": ["x", "y", None, "x", "y", None], "none": [None] * 6}
    data = ProbeData("six", LabelledImages.from_files("six", [b""] * 6, {"half": labels["half"]}), None, 0.5)
    (task,) = data.tasks()
    split = data.split(task, 0)
    assert sorted([*split.train_rows, *split.test_rows]) == [0, 1, 3, 4]
    with pytest.raises(HiveError, match="six: no image has a label of 'none'"):
        ProbeData("six", LabelledImages.from_files("six", [b""] * 6, labels), None).tasks()
    with pytest.raises(HiveError, match="none: holds no image"):
        ProbeData("six", images, LabelledImages.from_files("none", [], {TASK: []}))
    with pytest.raises(HiveError, match="2 labels of 'short' for 6 images"):
        ProbeData("six", LabelledImages.from_files("six", [b""] * 6, {"short": ["a", "b"]}), None)
    with pytest.raises(HiveError, match="seven: has no labels of 'label'"):
        ProbeData("six", images, LabelledImages.from_files("seven", [b""], {"other": ["a"]})).tasks()


def test_scene_factors_agree_with_the_scenes_own_questions() -> None:
    seen: dict[str, set] = {factor: set() for factor in FACTORS}
    for index in range(400):
        scene = random_scene(random.Random(index)) if index % 2 else make_scene(0, "s", index, questions=1).scene
        found = scene_factors(scene.as_dict())
        answers: dict[tuple[str, str], str] = {(one.kind, one.text): one.answer for one in all_questions(scene)}
        assert found["count"] == str(len(scene.items))
        assert found["text"] == scene.word
        for factor in ("colour", "shape", "size"):
            values = {getattr(item, factor) for item in scene.items}
            assert found[factor] == (values.pop() if len(values) == 1 else None)
        shapes = sorted({item.shape for item in scene.items})
        if len(scene.items) == 2 == len(shapes):
            assert found["relation"] == answers.get(("relation", f"where is the {shapes[0]} from the {shapes[1]}?"))
        else:
            assert found["relation"] is None
        for factor, value in found.items():
            seen[factor].add(value)
    assert {factor: len(values - {None}) for factor, values in seen.items()} == {
        **{"colour": 8, "shape": 5, "size": 3},
        **{"count": 3, "relation": 4, "text": 8},
    }


def test_scene_probe_data() -> None:
    train, test = (list(caption_samples(0, split, 60, 32)) for split in ("train", "test"))
    data = scene_probe_data(train, test, ("colour", "shape"))
    assert [task.name for task in data.tasks()] == ["colour", "shape"]
    assert data.train.read(5) == train[5].images[0]
    assert data.train.labels["shape"][5] == train[5].meta["scene"]["items"][0]["shape"]
    with pytest.raises(HiveError, match="'count' has one class, '1'"):
        scene_probe_data(train, test, ("count",)).tasks()
    assert len(scene_probe_data(*[list(scene_samples(0, s, 300, 32)) for s in "ab"]).tasks()) == 6
    with pytest.raises(HiveError, match="factor 'color': expected one of colour"):
        scene_probe_data(train, test, ("color",))
    with pytest.raises(HiveError, match="'text-0' is no scene"):
        scene_probe_data(list(text_samples(0, "text", 1)), test)


def test_presets_hold_the_papers_epochs() -> None:
    assert {name: preset.epochs for name, preset in PRESETS.items() if preset.epochs != 5} == {"imagenet1k": 1}
    assert set(PRESETS) == {
        *("food101", "caltech256", "imagenet1k", "cifar10", "cifar100", "stanford_cars", "oxford_pets")
    }
