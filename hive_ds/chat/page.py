"""A page in the browser: show a picture, ask, and see where the model looked for each word of the answer.

Nothing is fetched from elsewhere and nothing is reported: system fonts, no telemetry, no share link.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import TextIteratorStreamer

from hive_ds.chat.answer_maps import AnswerMaps, answer_maps
from hive_ds.chat.conversation import Answer, AnswerSettings, Conversation, read_image
from hive_ds.chat.loading import ChatModel
from hive_ds.errors import HiveError

FONTS = ("system-ui", "sans-serif")
ASK_API = "ask"
"""Name of the page's one public endpoint: picture and question in, answer first out."""
HOUR = 3600
BUTTONS = ("fullscreen", "download")
"""Of a picture; not the one that shares it on a hub."""


def require_gradio() -> Any:
    """The package gradio; HiveError if it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise HiveError(f"the page needs gradio ({error}): pip install 'hive-ds[chat]'") from error
    return gradio


def serve(chat: ChatModel, settings: AnswerSettings, *, host: str, port: int, block: bool = True) -> Any:
    """Serve the page; until interrupted if ``block``. Returns gradio's Blocks, which ``close`` ends.

    Raises:
        HiveError: gradio is not installed, or the address cannot be listened on.
    """
    gradio = require_gradio()
    page = build_page(chat, settings)
    theme = gradio.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace"))
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            footer_links=[], theme=theme, max_file_size="50mb",
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise HiveError(f"page at {host}:{port}: {error}") from error
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return page


def build_page(chat: ChatModel, settings: AnswerSettings) -> Any:
    """The page as gradio's Blocks."""
    gr = require_gradio()
    asks = chat.template == "chat"
    with gr.Blocks(title="HIVE-DS", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown(f"### Ask about a picture\n`{chat.folder}`. Every question stands alone: no history.")
        kept = gr.State()
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", type="filepath", sources=["upload", "webcam"], height=320)
                question = gr.Textbox(label="Question", placeholder="what is in the picture?", lines=1, visible=asks)
                button = gr.Button("Ask" if asks else "Describe", variant="primary")
                answer = gr.Textbox(label="Answer", interactive=False)
            with gr.Column():
                view = gr.Image(
                    label="Where the model looked", interactive=False, height=320, format="png", buttons=BUTTONS
                )
                note = gr.Markdown()
                # Not hidden until there is an answer: with gradio 6.17 the page hangs when they appear.
                token = gr.Radio(label="For which part of the answer", choices=[])
                layer = gr.Radio(label="At which layer", choices=[])
                own = gr.Checkbox(label="A scale of its own for each map")
        choosers = [token, layer, own]

        def ask(file: str | None, text: str) -> Iterator[list[Any]]:
            still = [gr.skip()] * (len(choosers) + 3)
            try:
                for said in stream_answer(chat, settings, file, text or ""):
                    if isinstance(said, str):
                        yield [said, *still]
                    else:
                        maps = answer_maps(chat, said)
                        yield [said.text, maps, *_chosen(gr, maps), *show(maps, 0, best_layer(maps), False)]
            except HiveError as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from error

        def show(maps: AnswerMaps | None, row: int, at: int, per_panel: bool) -> tuple[Any, str]:
            return (
                (None, "") if maps is None else (maps.panel(row, at, 0, per_panel=per_panel), describe(maps, row, at))
            )

        outputs = [answer, kept, *choosers, view, note]
        gr.on([button.click, question.submit], ask, [picture, question], outputs, api_name=ASK_API)
        for chooser in choosers:
            chooser.input(show, [kept, *choosers], [view, note], api_visibility="private")
    return page


def stream_answer(chat: ChatModel, settings: AnswerSettings, file: str | None, question: str) -> Iterator[str | Answer]:
    """What has been said so far, again and again; at the end the `Answer`.

    Raises:
        HiveError: no picture, no question, or what `Conversation.ask` refuses.
    """
    if file is None:
        raise HiveError("no picture: upload one, or take one")
    if chat.template == "chat" and not question.strip():
        raise HiveError("no question: write one")
    conversation = Conversation(chat, settings)
    conversation.show(read_image(file))
    streamer = TextIteratorStreamer(chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(conversation.ask, question, streamer)
        answer.add_done_callback(lambda _: streamer.end())  # an error before the first token ends the stream, too
        said = ""
        for piece in streamer:
            said += piece
            yield said
        yield answer.result()


def best_layer(maps: AnswerMaps) -> int:
    """The layer (its place among the maps) at which the whole answer looked at the picture most."""
    shares = [float(maps.rows[0].on_patches(layer, 0).sum()) for layer in maps.maps.layers]
    return shares.index(max(shares))


def describe(maps: AnswerMaps, row: int, layer: int) -> str:
    """How much of the attention one map holds."""
    values = maps.rows[row].on_patches(maps.maps.layers[layer], 0)
    return (
        f"{float(values.sum()):.0%} of the attention is on the picture, at most {float(values.max()):.1%} on one patch"
        f" of {values.shape[0]} x {values.shape[1]}; the rest is on the text."
    )


def _chosen(gr: Any, maps: AnswerMaps) -> list[Any]:
    """The choosers for this answer: the whole of it, at its best layer."""
    tokens = [(row.label, place) for place, row in enumerate(maps.rows)]
    layers = [(f"{one.layer}", place) for place, one in enumerate(maps.maps.layers)]
    return [
        gr.Radio(choices=tokens, value=0),
        gr.Radio(choices=layers, value=best_layer(maps)),
        gr.Checkbox(value=False),
    ]
