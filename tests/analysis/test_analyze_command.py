"""hive-ds analyze: pictures and numbers of a checkpoint, a picture and a text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scene_models import save_cascaded_scene_model, save_scene_model

from hive_ds.analysis import gradient_pictures
from hive_ds.analysis.attention_pictures import GAP, PANEL
from hive_ds.analysis.block_gradients import block_gradients
from hive_ds.analysis.gradient_pictures import CAPTION, gradient_maps
from hive_ds.analysis.samples import Subject, picture_sample, stored_samples
from hive_ds.analysis.token_pictures import MOST_TOKENS, TITLE, _side_by_side, _spread, token_maps
from hive_ds.chat.loading import load_chat_model
from hive_ds.cli import main
from hive_ds.constants import IGNORE_INDEX, IMAGE_TOKEN
from hive_ds.data.mds import write_mds
from hive_ds.data.scenes_samples import question_samples, text_samples
from hive_ds.data.schema import Sample, Turn
from hive_ds.errors import HiveError

QUESTION, ANSWER = "what colour is the ring?", "blue"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hive``, ``sa``, ``captions`` (a stage that learned those), ``data`` and a picture."""
    folder = tmp_path_factory.mktemp("analyze")
    save_scene_model(folder / "hive")
    save_cascaded_scene_model(folder / "sa")
    shutil.copytree(folder / "hive", folder / "stage1" / "model")
    (folder / "stage1" / "recipe.yaml").write_text("{data: {template: plain}, stages: {}}")
    (folder / "stage1" / "DONE").touch()
    samples = list(question_samples(0, "questions", 4, 64))
    write_mds([*text_samples(0, "text", 2), *samples], folder / "data")
    (folder / "scene.png").write_bytes(samples[0].images[0])
    return folder


def subject_of(folder: Path) -> Subject:
    chat = load_chat_model(folder)
    return Subject(folder.name, chat.model, chat.processor, chat.template)


def run(capsys: pytest.CaptureFixture[str], *command: object) -> Any:
    """What the command printed as JSON."""
    assert main(["analyze", *map(str, command), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def asked(folder: Path, kind: str) -> list[str]:
    return [f"{folder}/{kind}", "--image", f"{folder}/scene.png", "--question", QUESTION, "--text", ANSWER]


@pytest.mark.parametrize("kind", ["hive", "sa"])
def test_gradients(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """The loss is that of training on the answer; what the JSON says is what the model does."""
    found = run(capsys, "gradients", *asked(folder, kind), "--out", tmp_path / "map.png")
    subject = subject_of(folder / kind)
    batch = subject.batch([picture_sample(folder / "scene.png", ANSWER, QUESTION)])
    expected = block_gradients(subject.model, batch.model_inputs("cpu", torch.float32))
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["supervised_tokens"] == ["blue", "<|end|>"]
    rendered = subject.processor.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{QUESTION}"}], add_generation_prompt=True
    )
    prompt = subject.processor(rendered, folder / "scene.png")["input_ids"][0]
    assert batch.input_ids[: len(prompt)].equal(prompt)
    assert (batch.labels[: len(prompt)] == IGNORE_INDEX).all()
    readers = {"hive": ["layer 1", "", "layer 3", ""], "sa": ["", "", "LLM input", ""]}[kind]
    assert [block["read_by"] for block in found["blocks"]] == readers
    for block in found["blocks"][:3]:
        torch.testing.assert_close(torch.tensor(block["map"]), expected.on_patches(0)[block["block"]])
        assert block["norm"] ** 2 == pytest.approx(np.square(block["map"]).sum(), rel=1e-5)
    assert found["blocks"][3]["norm"] is found["blocks"][3]["map"] is None
    assert Image.open(tmp_path / "map.png").format == "PNG"


def test_captions_are_supervised_whole(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = ["--image", f"{folder}/scene.png", "--text", "a red circle", "--out", f"{tmp_path}/map.png"]
    assert main(["analyze", "gradients", f"{folder}/stage1", *picture]) == 0
    printed = capsys.readouterr()
    first, *_, last = printed.out.splitlines()
    assert first.endswith(" over 4 supervised tokens: a red circle <|end|>")
    assert last.split(maxsplit=1) == ["4", "no gradient"]
    assert f"wrote {tmp_path}/map.png" in printed.err
    assert main(["analyze", "gradients", f"{folder}/stage1", *picture, "--question", "red?"]) == 2
    assert "has learned captions (template plain): expected no --question" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "layers"), [("hive", [1, 3]), ("sa", [0, 1, 2, 3, 4])])
def test_attention(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, layers: list[int]
) -> None:
    """Every token at every layer; rows of text and picture sum to 1; tokens before the picture do not see it."""
    found = run(capsys, "attention", *asked(folder, kind), "--head", 2, "--out", tmp_path / "map.png")
    assert found["head"] == 2
    assert [layer["layer"] for layer in found["layers"]] == layers
    subject = subject_of(folder / kind)
    maps = token_maps(subject, picture_sample(folder / "scene.png", ANSWER, QUESTION), head=2)
    assert found["tokens"] == subject.token_names(maps.batch)
    first = found["image_offset"]
    assert 0 < first < len(found["tokens"])
    for said, layer in zip(found["layers"], maps.maps.layers, strict=True):
        on_picture = torch.tensor(said["on_picture"])
        torch.testing.assert_close(on_picture + layer.text_TT.sum(1), torch.ones(len(on_picture)), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(said["maps"]).sum((1, 2)), on_picture)
        assert (on_picture[:first] == 0).all()
        assert (on_picture[first:] > 0).all()
    head, *table = maps.lines()
    assert head.split()[-2:] == ["layer", str(layers[-1])]
    assert [row[:34].strip() for row in table] == found["tokens"][first:]
    assert [row[34:].split() for row in table] == [
        [f"{layer['on_picture'][token]:.1%}" for layer in found["layers"]]
        for token in range(first, len(found["tokens"]))
    ]
    labels = [row.label for row in maps.rows()]
    assert labels[-2:] == ["blue\n→ <|end|>", "<|end|>"]
    assert [row.tokens for row in maps.rows()] == [[token] for token in range(first, len(found["tokens"]))]
    assert min(Image.open(tmp_path / "map.png").size) > len(layers) * PANEL


@pytest.mark.parametrize("images", [0, 2])
def test_a_picture_is_that_of_one_image(folder: Path, images: int) -> None:
    picture = (folder / "scene.png").read_bytes()
    turns = (Turn("user", f"{IMAGE_TOKEN * images}{QUESTION}"), Turn("assistant", ANSWER))
    with pytest.raises(HiveError, match=f"sample 'a' has {images} images; its picture expects one"):
        subject_of(folder / "hive").pictured(Sample("a", turns, (picture,) * images))


def test_long_texts_go_on_beside_the_first_rows(folder: Path) -> None:
    subject = subject_of(folder / "hive")
    maps = token_maps(subject, picture_sample(folder / "scene.png", "a red circle and a blue ring " * 12))
    assert len(maps.rows()) > MOST_TOKENS
    figure = maps.figure()
    assert max(figure.size) < 1.5 * min(figure.size)
    assert max(figure.size) < MOST_TOKENS * PANEL / 2
    title = "hive: attention of each token (→ the one that it predicts) on the picture, mean over heads"
    assert maps._title(len(maps.rows())) == title
    assert maps._title(MOST_TOKENS) == f"{title} (first {MOST_TOKENS} of {len(maps.rows())} tokens)"
    deep = replace(maps, maps=replace(maps.maps, layers=maps.maps.layers * 6), head=2)
    assert deep._title(MOST_TOKENS).endswith(f"head 2 (first 64 of {len(maps.rows())} tokens, 8 of 12 layers)")


def test_layers_of_a_deep_model_are_spread_from_the_first_to_the_last() -> None:
    assert _spread(range(20)) == [0, 3, 5, 8, 11, 14, 16, 19]
    assert _spread(range(8)) == list(range(8))


def test_panels_say_which_layer_reads_their_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[tuple[str, Image.Image]]] = []
    monkeypatch.setattr(gradient_pictures, "_panel_figure", lambda panels, *_: drawn.append(panels))
    gradient_maps(subject_of(folder / "hive"), picture_sample(folder / "scene.png", ANSWER, QUESTION)).figure()
    heads = [caption.rpartition("\n")[0] for caption, _ in drawn[0]]
    assert heads == ["", "block 1\n→ layer 1", "block 2", "block 3\n→ layer 3", "block 4"]


def test_parts_of_a_long_figure_stand_side_by_side() -> None:
    whole = _side_by_side([Image.new("RGB", (300, 9), "red"), Image.new("RGB", (100, 5), "blue")], "title")
    assert whole.size == (400, TITLE + 9)
    assert [whole.getpixel((x, TITLE + 4)) for x in (0, 299, 300, 399)] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2


def panel(figure: Image.Image, number: int) -> np.ndarray:
    left = 14 + number * (PANEL + 2 * GAP)
    return np.asarray(figure.crop((left, 40 + CAPTION, left + PANEL, 40 + CAPTION + PANEL))).astype(int)


def test_one_scale_for_all_blocks_or_one_each(folder: Path) -> None:
    """The strongest block looks alike on both; a weaker one is pale on the shared scale."""
    maps = gradient_maps(subject_of(folder / "hive"), picture_sample(folder / "scene.png", ANSWER, QUESTION))
    for gradient in maps.gradients.by_block.values():
        gradient[:] = 0
    maps.gradients.by_block[1][:2], maps.gradients.by_block[2][:2] = 1.0, 0.1
    shared, own = maps.figure(), maps.figure(per_panel=True)
    assert shared.width > own.width  # the scale beside the panels
    hot = (slice(0, 20), slice(0, 20))  # the first patch
    assert np.abs(panel(shared, 1) - panel(own, 1)).max() <= 2
    assert np.abs(panel(own, 1)[hot] - panel(own, 2)[hot]).max() <= 2
    assert np.ptp(panel(shared, 1)[hot], axis=2).mean() > 2 * np.ptp(panel(shared, 2)[hot], axis=2).mean()
    assert np.ptp(panel(own, 4), axis=2).max() <= 2  # grey: no gradient


@pytest.mark.parametrize("kind", ["gradients", "attention"])
@pytest.mark.parametrize("scale", ["shared", "panel"])
def test_the_picture_has_the_scale_that_is_asked_for(folder: Path, tmp_path: Path, kind: str, scale: str) -> None:
    checkpoint, *picture = asked(folder, "hive")
    options = ["--scale", scale, "--out", f"{tmp_path}/map.png"]
    assert main(["analyze", kind, f"hive={checkpoint}", *picture, *options]) == 0
    draw: Any = {"gradients": gradient_maps, "attention": token_maps}[kind]
    maps = draw(subject_of(folder / "hive"), picture_sample(folder / "scene.png", ANSWER, QUESTION))
    assert np.array_equal(Image.open(tmp_path / "map.png"), maps.figure(per_panel=scale == "panel"))


def test_drift_from_the_initial_encoder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject_of(folder / "hive").model.vision_encoder.save_pretrained(tmp_path / "encoder")
    options = ["--initial", tmp_path / "encoder", "--out", tmp_path / "flow.png"]
    (found,) = run(capsys, "flow", *asked(folder, "hive"), *options)["models"]
    assert [block["similarity"] for block in found["blocks"]] == pytest.approx([1.0] * 4)
    assert found["routes"] == []  # nothing was knocked out


def test_flow(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["flow", f"HIVE={folder}/hive", f"{folder}/sa", "--data", folder / "data", "--samples", 3, "--knock-out"]
    found = run(capsys, *command, "--out", tmp_path / "flow.png")
    assert found["samples"] == [sample.id for sample in stored_samples(folder / "data", 3)]
    assert len(found["samples"]) == 3
    hive, cascaded = found["models"]
    assert (hive["checkpoint"], cascaded["checkpoint"]) == ("HIVE", f"{folder}/sa")
    assert [(route["block"], route["layer"]) for route in hive["routes"]] == [(1, 1), (3, 3)]
    assert cascaded["routes"] == []
    assert [block["norm"] is None for block in cascaded["blocks"]] == [False, False, False, True]
    assert Image.open(tmp_path / "flow.png").height == 2 * 380
    one = run(capsys, "flow", *asked(folder, "hive"), "--out", tmp_path / "flow.png")
    assert one["samples"] == ["scene.png"]
    write_mds(list(text_samples(0, "text", 2)), tmp_path / "text")
    with pytest.raises(HiveError, match="holds no sample with one image"):
        stored_samples(tmp_path / "text", 1)
