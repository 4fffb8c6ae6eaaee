"""``hive-ds chat``: ask a trained model about pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import command, port_number, require_file_to_write
from hive_ds.errors import HiveError


def add_chat_command(commands: Any) -> None:
    """Add the command to ``commands``."""
    parser = command(
        commands,
        "chat",
        _run,
        "ask a trained model about pictures, in the terminal or the browser",
        "Without a question it reads them one after another. Answers go to standard output as they come, all else to"
        " standard error.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a run, a stage or a model")
    question = parser.add_argument("question", metavar="[QUESTION]", help="<image> in it says where the pictures stand")
    # Not nargs="?": before Python 3.13 a question behind the options would be taken as left out.
    question.required = False
    parser.add_argument(
        "--image", dest="images", metavar="FILE", action="append", default=[], help="a picture; repeatable"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (default); above: drawn"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of what is drawn: the same answers again (default: others each time)"
    )
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="of a beam search (default: %(default)s)")
    parser.add_argument(
        "--map", metavar="PNG", type=Path, help="write where the model looked for the answer, by token and layer"
    )
    parser.add_argument(
        "--map-per-panel", action="store_true", help="give each panel of the map a scale of its own, not one for all"
    )
    parser.add_argument("--browser", action="store_true", help="open a page instead (needs the extra chat)")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page (default: %(default)s, this machine)")
    parser.add_argument("--port", type=port_number, default=7860, help="of the page (default: %(default)s)")


def _run(args: argparse.Namespace) -> None:
    _check(args)
    if args.browser:
        from hive_ds.chat.page import require_gradio

        require_gradio()  # before the model is loaded, which may take minutes
    import sys
    import warnings

    import transformers

    from hive_ds.chat.conversation import AnswerSettings, Conversation, read_image
    from hive_ds.chat.loading import load_chat_model

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"gradio\.")  # of what other packages have deprecated
    settings = AnswerSettings(args.max_new_tokens, args.temperature, args.beams, args.seed)
    images = [read_image(path) for path in args.images]
    chat = load_chat_model(args.checkpoint)
    print(chat, file=sys.stderr)
    if args.browser:
        from hive_ds.chat.page import serve

        serve(chat, settings, host=args.host, port=args.port)
        return
    from hive_ds.chat.terminal import answer_once, talk

    conversation = Conversation(chat, settings)
    for image in images:
        conversation.show(image)
    if args.question is not None or (chat.template == "plain" and images):
        answer_once(conversation, args.question, args.map, per_panel=args.map_per_panel)
    else:
        talk(conversation, args.map, per_panel=args.map_per_panel)


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    if args.browser:
        given = {"QUESTION": args.question, "--image": args.images, "--map": args.map}
        wrong = [name for name, value in given.items() if value]
        if wrong:
            raise HiveError(f"--browser with {', '.join(wrong)}: expected neither; the page asks for them")
    if args.map is not None and not args.map.parent.is_dir():
        raise HiveError(f"map {args.map}: there is no folder {args.map.parent}")
    require_file_to_write(args.map)
    if args.map is not None and args.question is not None and not args.images:
        raise HiveError("--map without --image: the map shows where in a picture the model looked")
