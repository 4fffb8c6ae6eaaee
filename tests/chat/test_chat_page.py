"""The page in the browser, asked through gradio's client: a stream, a map, clear refusals, nothing from elsewhere."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scene_models import save_scene_model

from hive_ds.chat import page as page_module
from hive_ds.chat.answer_maps import answer_maps
from hive_ds.chat.conversation import AnswerSettings, Conversation, read_image
from hive_ds.chat.loading import ChatModel, load_chat_model
from hive_ds.chat.page import describe, serve
from hive_ds.cli import main
from hive_ds.data.scenes_samples import question_samples
from hive_ds.errors import HiveError

gradio_client = pytest.importorskip("gradio_client", reason="needs gradio: pip install -e '.[chat]'")
SETTINGS = AnswerSettings(max_new_tokens=6)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    folder = tmp_path_factory.mktemp("model")
    save_scene_model(folder)
    (sample,) = question_samples(0, "questions", 1, 64)
    (folder / "picture.png").write_bytes(sample.images[0])
    (folder / "text.png").write_text("no picture")
    return load_chat_model(folder)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def page(chat: ChatModel) -> Iterator[Any]:
    page = serve(chat, SETTINGS, host="127.0.0.1", port=free_port(), block=False)
    yield page
    page.close()


def test_an_answer_streams_and_its_map_follows(page: Any, chat: ChatModel) -> None:
    client = gradio_client.Client(page.local_url, verbose=False)
    picture = chat.folder / "picture.png"
    job = client.submit(gradio_client.handle_file(picture), "what is it?", api_name="/ask")
    steps = list(job)
    conversation = Conversation(chat, SETTINGS)
    conversation.show(read_image(picture))
    expected = conversation.ask("what is it?").text
    assert steps[-1][0] == expected
    assert len(steps) > 2
    assert all(expected.startswith(step[0].strip()) for step in steps)
    *_, tokens, layers, _, view, note = steps[-1]
    assert tokens["choices"][0] == ["whole answer", 0]
    assert [name for name, _ in layers["choices"]] == ["1", "3"]
    assert "of the attention is on the picture" in note
    assert np.asarray(Image.open(view)).shape == (640, 640, 3)


def test_a_map_is_of_the_part_and_the_layer_that_are_chosen(
    page: Any, chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first of the whole answer at its best layer; then with a scale of its own, if asked for."""
    monkeypatch.setattr(page_module, "best_layer", lambda maps: 1)
    client = gradio_client.Client(page.local_url, verbose=False)
    picture = chat.folder / "picture.png"
    *_, last = client.submit(gradio_client.handle_file(picture), "what is it?", api_name="/ask")
    conversation = Conversation(chat, SETTINGS)
    conversation.show(read_image(picture))
    maps = answer_maps(chat, conversation.ask("what is it?"))
    *_, tokens, layers, _, view, note = last
    assert (tokens["value"], layers["value"], note) == (0, 1, describe(maps, 0, 1))
    assert np.array_equal(Image.open(view), maps.panel(0, 1, 0))
    chosen = [one for one in page.fns.values() if one.name == "show"]
    names = ["For which part of the answer", "At which layer", "A scale of its own for each map"]
    assert [[block.label for block in one.inputs[1:]] for one in chosen] == [names] * 3
    assert chosen[0].fn(None, 0, 0, False) == (None, "")
    for own in (False, True):
        shown, said = chosen[0].fn(maps, 2, 0, own)
        assert np.array_equal(shown, maps.panel(2, 0, 0, per_panel=own))
        assert said == describe(maps, 2, 0)
    assert not np.array_equal(maps.panel(2, 0, 0), maps.panel(2, 0, 0, per_panel=True))


def test_wrong_questions_are_told(page: Any, chat: ChatModel) -> None:
    client = gradio_client.Client(page.local_url, verbose=False)
    for file, question, message in (
        (None, "what is it?", "no picture: upload one"),
        (gradio_client.handle_file(chat.folder / "picture.png"), " ", "no question: write one"),
        (gradio_client.handle_file(chat.folder / "picture.png"), "why? " * 400, "expected at most 511"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(file, question, api_name="/ask")


def test_the_page_is_of_this_machine_alone(page: Any, chat: ChatModel) -> None:
    config = page.get_config_file()
    assert page.local_url.startswith("http://127.0.0.1:")
    assert page.share_url is None
    assert not page.analytics_enabled
    assert not any("http" in sheet for sheet in page.theme._stylesheets)
    buttons = [view["props"]["buttons"] for view in config["components"] if view["type"] == "image"]
    assert list(buttons[-1]) == ["fullscreen", "download"]
    with pytest.raises(HiveError, match=f"page at 127.0.0.1:{page.server_port}"):
        serve(chat, SETTINGS, host="127.0.0.1", port=page.server_port, block=False)


def test_without_gradio_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["chat", str(tmp_path), "--browser"]) == 2
    assert "the page needs gradio" in (printed := capsys.readouterr().err)
    assert "pip install 'hive-ds[chat]'" in printed
