"""What is asked, printed and drawn in the terminal, of a conversation that needs no model."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hive_ds.chat import terminal
from hive_ds.chat.terminal import CAPTION_NOTE, HELP, answer_once, talk
from hive_ds.errors import HiveError


class Conversation:
    """Answers with the question in capitals, or with a caption; asked to stop, it does as after Ctrl-C."""

    def __init__(self, template: str = "chat", beams: int = 1) -> None:
        self.chat = SimpleNamespace(template=template, processor=SimpleNamespace(tokenizer=None))
        self.settings = SimpleNamespace(beams=beams)
        self.heard: list[str] = []

    def ask(self, question: str, streamer: Any) -> Any:
        self.heard.append(question)
        if question == "stop":
            raise KeyboardInterrupt
        return SimpleNamespace(text=question.upper() or "A CAPTION")

    def show(self, picture: str) -> None:
        self.heard.append(f"shown {picture}")

    def reset(self) -> None:
        self.heard.append("reset")


def hear(monkeypatch: pytest.MonkeyPatch, conversation: Conversation, *lines: str) -> list[str]:
    """What a conversation is asked while somebody types ``lines``."""
    monkeypatch.setattr(terminal, "read_image", lambda path: path)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    talk(conversation, None, per_panel=False)  # type: ignore[arg-type]
    return conversation.heard


def test_an_answer_that_is_broken_off_is_forgotten_and_the_next_one_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ("one", "stop", "", "  two ", "/image my cat.png", "/reset", "/quit", "three")
    assert hear(monkeypatch, Conversation(), *typed) == ["one", "stop", "two", "shown my cat.png", "reset"]
    assert capsys.readouterr().err == f"{HELP}\n\n(stopped; the question is forgotten)\n"


def test_questions_that_are_no_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a file in Latin-1."""
    conversation = Conversation()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9?\n"), encoding="utf-8"))
    with pytest.raises(HiveError, match="standard input: is not UTF-8 text; expected questions, a line each"):
        talk(conversation, None, per_panel=False)  # type: ignore[arg-type]


def test_a_model_of_captions_gives_one_for_each_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only who has asked is told that questions are not read."""
    assert hear(monkeypatch, Conversation("plain"), "/image a.png") == ["shown a.png", ""]
    assert CAPTION_NOTE not in capsys.readouterr().err
    hear(monkeypatch, Conversation("plain"), "red?")
    assert capsys.readouterr().err.count(CAPTION_NOTE) == 1


@pytest.mark.parametrize(("beams", "printed"), [(1, ""), (3, "RED?\n")])
def test_what_a_beam_search_finds_is_printed_at_its_end(
    beams: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the streamer has printed it."""
    answer_once(Conversation(beams=beams), "red?", None, per_panel=False)  # type: ignore[arg-type]
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("per_panel", [False, True])
@pytest.mark.parametrize(("question", "title"), [("red?", "red? -> RED?"), (None, "-> A CAPTION")])
def test_a_map_is_called_after_question_and_answer(
    question: str | None, title: str, per_panel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figure(title: str, *, per_panel: bool) -> tuple[str, bool]:
        return title, per_panel

    drawn: list[Any] = []
    monkeypatch.setattr(terminal, "answer_maps", lambda chat, answer: SimpleNamespace(figure=figure))
    monkeypatch.setattr(terminal, "save_picture", lambda *given: drawn.append(given))
    answer_once(Conversation(), question, Path("map.png"), per_panel=per_panel)  # type: ignore[arg-type]
    assert drawn == [((title, per_panel), Path("map.png"))]
