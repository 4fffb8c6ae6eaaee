"""Whole probes: the planted best block is found, seeds change what they may, and the command writes what it says."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from probe_data import encoder, labelled, noise_png, png, save_encoder
from scene_models import save_cascaded_scene_model, save_scene_model

from hive_ds.cli import main
from hive_ds.errors import HiveError
from hive_ds.evaluation.probes import features as features_module
from hive_ds.evaluation.probes import report as report_module
from hive_ds.evaluation.probes.data import TASK, LabelledImages, ProbeData
from hive_ds.evaluation.probes.encoder import EncoderInfo, load_encoder
from hive_ds.evaluation.probes.features import ExtractSettings
from hive_ds.evaluation.probes.report import ProbeReport
from hive_ds.evaluation.probes.results import BlockResult, Score, best_block
from hive_ds.evaluation.probes.settings import AttentiveSettings, KnnSettings, LinearSettings, ProbeSettings
from hive_ds.evaluation.probes.sources import DataOptions, open_data
from hive_ds.evaluation.probes.sweep import probe
from hive_ds.evaluation.scoring import Share
from hive_ds.export import export_encoder
from hive_ds.model.vision import vision_blocks

QUIET = ExtractSettings(batch_size=16, progress=False)
HEADS = {
    "linear": LinearSettings(),
    "knn": KnnSettings(k=5),
    "attentive": AttentiveSettings(epochs=4, batch_size=32, lr=3e-3),
}


def two_corners(name: str, size: int, first: int) -> LabelledImages:
    """Noise with two corners bright or dark; the class says whether they are alike."""
    drawn = np.random.default_rng(first)
    files, labels = [], []
    for _ in range(size):
        pixels = drawn.integers(100, 156, (32, 32, 3))
        left, right = drawn.integers(0, 2, 2)
        pixels[:8, :8], pixels[:8, 24:] = 255 * left, 255 * right
        files.append(png(pixels))
        labels.append("alike" if left == right else "unlike")
    return LabelledImages.from_files(name, files, {TASK: labels})


@pytest.mark.parametrize("head", HEADS)
def test_the_planted_block_is_found(head: str) -> None:
    """Block 1 sees noise, block 2 is told the class along one direction, and block 3 forgets it again."""
    probed = encoder()
    products = []

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(len(like)))

    def multiply(_: object, inputs: tuple) -> tuple:
        pixels = inputs[0]
        products[:] = [(pixels[:, :, :8, :8].mean((1, 2, 3)) * pixels[:, :, :8, 24:].mean((1, 2, 3)))[:, None]]
        return (noise(pixels),)

    def tell(_: object, __: tuple, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[..., 7] += 30 * products[0]
        return output

    def forget(_: object, __: tuple, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.copy_(noise(hidden))
        return output

    embeddings = next(module for name, module in probed.tower.named_modules() if name.endswith("embeddings"))
    embeddings.register_forward_pre_hook(multiply)
    vision_blocks(probed.tower)[1].register_forward_hook(tell)
    vision_blocks(probed.tower)[2].register_forward_hook(forget)
    data = ProbeData("corners", two_corners("train", 160, 0), two_corners("test", 80, 1))
    results = probe(probed, data, ProbeSettings(HEADS[head], "all"), extract=QUIET)
    assert [result.block for result in results] == [1, 2, 3, 4]
    best = best_block(results, "siglip-0", TASK)
    assert best.block == 2
    assert best.accuracy > 0.95
    assert max(result.accuracy for result in results if result.block != 2) < 0.7


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("given", [True, False])
def test_seeds_change_what_they_may(head: str, given: bool) -> None:
    train, test = labelled("train", 90, classes="abc"), labelled("test", 45, first=500, classes="abc")
    data = ProbeData("noise", train, test if given else None)
    settings = ProbeSettings(HEADS[head], (3,), seeds=(0, 4))
    (one,) = probe(encoder(), data, settings, extract=QUIET)
    (again,) = probe(encoder(), data, settings, extract=ExtractSettings(16, workers=2, progress=False))
    assert one == again
    fixed = given and head == "knn"
    assert [score.seed for score in one.scores] == ([0] if fixed else [0, 4])
    assert (one.std is None) == fixed
    assert (one.train_size, one.test_size) == ((90, 45) if given else (72, 18))
    values = [score.share.value for score in one.scores]
    assert one.accuracy == pytest.approx(np.mean(values))
    assert fixed or one.std == pytest.approx(np.std(values, ddof=1))
    if given and head == "linear":
        assert len(probe(encoder(), data, ProbeSettings(LinearSettings(0.01)), extract=QUIET)[0].scores) == 1


def test_one_pass_serves_every_task(monkeypatch) -> None:
    """Tasks share the features; a task's images without a label count in neither split."""
    files = [noise_png(n, (32, 32), shift=80 * (n % 2)) for n in range(60)]
    labels = {
        "red": ["much" if n % 2 else "little" for n in range(60)],
        "some": [("x" if n % 2 else "y") if n % 3 else None for n in range(60)],
    }
    encoded = []
    encode = features_module.encode_images
    monkeypatch.setattr(
        features_module, "encode_images", lambda *a, **k: encoded.append(len(k["pixel_values"])) or encode(*a, **k)
    )
    data = ProbeData("tasks", LabelledImages.from_files("tasks", files, labels), None, 0.25)
    results = probe(encoder(), data, ProbeSettings(KnnSettings(3), (1, 4)), extract=QUIET)
    assert [(one.task, one.block) for one in results] == [("red", 1), ("red", 4), ("some", 1), ("some", 4)]
    assert sum(encoded) == 60
    assert [one.train_size + one.test_size for one in results] == [60, 60, 40, 40]
    assert min(one.accuracy for one in results) > 0.9
    report = ProbeReport(data, ProbeSettings(KnnSettings(3), (1, 4)), [encoder().info], results)
    assert [row[0] for row in report.rows("some")] == ["block", "1", "4", "best"]


WRONG_SETTINGS = {
    "k": (lambda: ProbeSettings(KnnSettings(k=0)), "knn probe: k is 0, expected a number above 0"),
    "l2": (lambda: ProbeSettings(LinearSettings(l2=-1.0)), "linear probe: l2 is -1.0"),
    "lr": (lambda: ProbeSettings(AttentiveSettings(lr=0.0)), "attentive probe: lr is 0.0"),
    "seeds": (lambda: ProbeSettings(KnnSettings(), seeds=()), "expected at least one, each once"),
    "blocks": (lambda: ProbeSettings(KnnSettings(), "first"), "'first': expected numbers or one of all, last"),
    "no blocks": (lambda: ProbeSettings(KnnSettings(), ()), "blocks: expected at least one"),
    "stored": (lambda: ExtractSettings(stored="int8"), "'int8': expected one of fp32, fp16"),
    "dtype": (lambda: encoder(dtype="int8"), "dtype 'int8': expected one of fp32"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_named(case: str) -> None:
    make, expected = WRONG_SETTINGS[case]
    with pytest.raises(HiveError, match=expected):
        make()


def write_folder(root: Path) -> Path:
    for split, size in (("train", 30), ("test", 12)):
        images = labelled(split, size, first=len(split))
        for number, label in enumerate(images.labels[TASK]):
            path = root / split / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images.read(number))
    return root


def test_an_encoder_inside_of_any_trained_model_is_the_one_exported(tmp_path: Path) -> None:
    """SA's stages, and 4 and 5, hold a LLaVA-style model."""
    for name, save in (("hive", save_scene_model), ("cascaded", save_cascaded_scene_model)):
        save(tmp_path / name)
        export_encoder(tmp_path / name, tmp_path / f"{name}-encoder")
        inside, exported = (load_encoder(tmp_path / one, device="cpu") for one in (name, f"{name}-encoder"))
        assert replace(inside.info, name="", source="") == replace(exported.info, name="", source="")


def test_class_folders_can_be_handed_to_started_workers(tmp_path: Path) -> None:
    """From Python 3.14 on they are not forked."""
    data = open_data(DataOptions(str(write_folder(tmp_path))))
    again = pickle.loads(pickle.dumps(data.train))
    assert (again.read(3), again.describe(3)) == (data.train.read(3), data.train.describe(3))


def test_command_compares_encoders(tmp_path: Path, capsys, monkeypatch) -> None:
    data = write_folder(tmp_path / "data")
    named = [f"base={save_encoder(tmp_path / 'base')}", f"SA={save_encoder(tmp_path / 'sa', seed=1)}"]
    command = ["probe", *named, "--data", str(data), "--cache", str(tmp_path / "cache"), "--seeds", "2"]
    assert main([*command, "--head", "linear", "--blocks", "all", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "probes.json").read_text())
    assert [(one["encoder"], one["block"]) for one in found["results"]] == [
        (name, block) for name in ("base", "SA") for block in (1, 2, 3, 4)
    ]
    for one in found["results"]:
        assert [run["seed"] for run in one["runs"]] == [0, 1]
        assert one["accuracy"] == pytest.approx(np.mean([run["right"] / 12 for run in one["runs"]]))
        assert f"{100 * one['accuracy']:.1f} ± {100 * one['std']:.1f}" in printed
    assert found["head"] == {"name": "linear", "l2": None, "max_steps": 1000}
    assert (found["data"]["train"]["size"], found["data"]["test"]["size"]) == (30, 12)
    assert {"hive_ds", "torch", "transformers", "python"} <= set(found["versions"])
    base, other = found["encoders"]
    assert base["weights_sha256"] != other["weights_sha256"]
    assert base["processor_sha256"] == other["processor_sha256"]
    page = (tmp_path / "out" / "probes.html").read_text()
    assert page.count("<polyline") == 2
    assert base["weights_sha256"] in page
    assert "http" not in page

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(features_module, "encode_images", never)  # what the first run computed is in the cache
    assert main([*command, "--head", "knn", "--k", "3", "--blocks", "2,4"]) == 0
    assert " ± " not in capsys.readouterr().out


def test_a_report_says_how_well_and_on_how_many(capsys, monkeypatch) -> None:
    """Standard deviations of n - 1; fits that did not end; percent in table and plot."""
    drawn: list[list] = []
    monkeypatch.setattr(report_module, "line_plot", lambda lines, *_: drawn.append(lines) or "")
    scores = [
        tuple(Score(seed, Share(right, 10), right / 20, {"gradient": gradient}) for seed, right in enumerate(rights))
        for rights, gradient in (((5, 6, 7), 2e-3), ((7, 7, 10), 1e-4))
    ]
    results = [BlockResult("HIVE", TASK, block, 3, 40, 10, one) for block, one in enumerate(scores, start=1)]
    assert results[0].as_dict()["std"] == pytest.approx(0.1)
    assert results[0].as_dict()["mean_per_class"] == pytest.approx(0.3)
    images = LabelledImages.from_files("food train", [b"1", b"2"], {TASK: ["a", "b"]})
    info = EncoderInfo("HIVE", "runs/hive", "SiglipVisionModel", 2, "fp32", *["sha"] * 3, "SiglipImageProcessor", "sha")
    report = ProbeReport(ProbeData("food", images, None), ProbeSettings(LinearSettings(), "all"), [info], results)
    assert report.rows(TASK) == [["block", "HIVE"], ["1", "60.0 ± 10.0"], ["2", "80.0 ± 17.3"], ["best", "block 2"]]
    report.print()
    printed = capsys.readouterr().out
    assert "food, label: linear probe, 3 classes, 40 training and 10 test images" in printed
    assert "3 linear fits ended with a gradient above 0.001" in printed
    report._page()
    assert drawn[0][0].points == [(1, pytest.approx(60)), (2, pytest.approx(80))]


WRONG_COMMANDS = {
    "option of another head": (["base", "--k", "3"], "--k: is no option of the linear head"),
    "two of one name": (["base", "x/base"], "encoder x/base: there is another one named 'base'; write NAME=x/base"),
    "no name": (["=base"], "encoder '=base': expected ENCODER or NAME=ENCODER"),
    "no such encoder": (["{tmp}/none"], "vision encoder folder {tmp}/none does not exist"),
    "no encoder in it": (["{tmp}/data"], "{tmp}/data: holds neither a model"),
    "config of another kind": (["{tmp}/damaged"], "vision encoder '{tmp}/damaged'"),
    "no processor": (["{tmp}/bare"], "image processor of {tmp}/bare does not load: "),
    "block": (["{tmp}/base", "--blocks", "2,9"], "block 9 of base: expected 1 to 4"),
    "blocks": (["{tmp}/base", "--blocks", "first"], "blocks 'first': expected numbers or one of"),
    "a digit that is no number": (["{tmp}/base", "--blocks", "²"], "blocks '²': expected numbers or one of"),
    "no weight": (["{tmp}/base", "--l2", "nan"], "linear probe: l2 is nan, expected a number above 0"),
    "k": (["{tmp}/base", "--head", "knn", "--k", "31"], "kNN probe: k is 31, expected at most the 30 training images"),
    "seeds": (["{tmp}/base", "--seeds", "0"], "seeds: none; expected at least one, each once"),
    "workers": (["{tmp}/base", "--workers", "-1"], "batch size 64, workers -1: expected at least 1 and 0"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("probes")
    write_folder(root / "data")
    save_encoder(root / "base")
    save_encoder(root / "bare")
    (root / "bare" / "preprocessor_config.json").unlink()
    (root / "damaged").mkdir()
    (root / "damaged" / "config.json").write_text("[1]")
    return root


@pytest.mark.parametrize("case", WRONG_COMMANDS)
def test_wrong_commands_are_one_line(case: str, folder: Path, tmp_path: Path, capsys) -> None:
    arguments, expected = WRONG_COMMANDS[case]
    given = [argument.format(tmp=folder) for argument in arguments]
    command = ["probe", *given, "--data", f"{folder}/data", "--cache", "none", "--out", f"{tmp_path}/out"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"error: {expected.format(tmp=folder)}" in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()
