"""Asking in the terminal: one question, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import TextStreamer

from hive_ds.analysis.attention_pictures import save_picture
from hive_ds.chat.answer_maps import answer_maps
from hive_ds.chat.conversation import Answer, Conversation, read_image
from hive_ds.errors import HiveError

HELP = "Ask, or: /image FILE shows a picture, /reset forgets everything, /quit ends."
CAPTION_NOTE = "note: this model gives captions (template plain): the question is not read"


def answer_once(conversation: Conversation, question: str | None, map_path: Path | None, *, per_panel: bool) -> None:
    """Print one answer as it comes, and write its attention map if asked for."""
    if conversation.chat.template == "plain" and question:
        print(CAPTION_NOTE, file=sys.stderr)
    answer = _print_answer(conversation, question or "")
    if map_path is not None:
        _save_map(conversation, answer, question or "", map_path, per_panel)


def talk(conversation: Conversation, map_path: Path | None, *, per_panel: bool) -> None:
    """Questions from standard input until it ends or ``/quit``; a wrong one is reported and forgotten."""
    print(HELP, file=sys.stderr)
    for line in _lines():
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                return
            if word == "/reset":
                conversation.reset()
            elif word == "/image":
                conversation.show(read_image(rest.strip()))
                if conversation.chat.template == "plain":
                    answer_once(conversation, None, map_path, per_panel=per_panel)
            elif word.startswith("/"):
                raise HiveError(f"command {word}: expected /image FILE, /reset or /quit")
            else:
                answer_once(conversation, line, map_path, per_panel=per_panel)
        except HiveError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped; the question is forgotten)", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Lines typed or piped in, empty ones left out.

    Raises:
        HiveError: what is piped in is no text.
    """
    import readline  # noqa: F401 (gives `input` a history and editing)

    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise HiveError("standard input: is not UTF-8 text; expected questions, a line each") from error
        if line:
            yield line


def _print_answer(conversation: Conversation, question: str) -> Answer:
    tokenizer = conversation.chat.processor.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = conversation.ask(question, streamer)
    if conversation.settings.beams > 1:  # nothing has been streamed
        print(answer.text)
    return answer


def _save_map(conversation: Conversation, answer: Answer, question: str, path: Path, per_panel: bool) -> None:
    title = " ".join([question, f"-> {answer.text}"]).strip()
    save_picture(answer_maps(conversation.chat, answer).figure(title, per_panel=per_panel), path)
    print(f"wrote {path}: where the model looked", file=sys.stderr)
