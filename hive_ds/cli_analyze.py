"""``hive-ds analyze ...``: where in a picture, and how deep in the encoder, a model's loss and attention reach."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_ds.cli_parts import command, require_file_to_write, require_positive, split_name
from hive_ds.errors import HiveError

if TYPE_CHECKING:
    from PIL import Image

    from hive_ds.analysis.samples import Subject
    from hive_ds.data.schema import Sample


CHECKPOINT = "folder of a run (its last finished stage), a stage or a model, HIVE's or a LLaVA-style one; NAME heads it"


def add_analyze_commands(commands: Any) -> None:
    """Add ``gradients``, ``attention`` and ``flow`` to ``commands``."""
    _add_gradients(commands)
    _add_attention(commands)
    _add_flow(commands)


def _add_gradients(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        _check(args)
        from hive_ds.analysis.gradient_pictures import gradient_maps

        sample = _picture(args)
        maps = gradient_maps(_subject(args.checkpoint, args), sample)
        _report(args, maps.values(), maps.lines(), maps.figure(per_panel=args.scale == "panel"))

    parser = command(
        commands,
        "gradients",
        run,
        "show, block by block, where in a picture the loss is sensitive",
        "The gradient of the loss at each encoder block's output, L2 norm over channels, on the patches.",
    )
    parser.add_argument("checkpoint", metavar="[NAME=]CHECKPOINT", help=CHECKPOINT)
    _add_picture(parser, required=True)
    _add_scale(parser)
    _add_output(parser, "gradients.png")


def _add_attention(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        _check(args)
        from hive_ds.analysis.token_pictures import token_maps

        sample = _picture(args)
        maps = token_maps(_subject(args.checkpoint, args), sample, head=args.head)
        _report(args, maps.values(), maps.lines(), maps.figure(per_panel=args.scale == "panel"))

    parser = command(
        commands,
        "attention",
        run,
        "show where in a picture each text token looks, layer by layer",
        "Rows are tokens, columns the LLM layers that see the picture: HIVE's routed ones, of other models all.",
    )
    parser.add_argument("checkpoint", metavar="[NAME=]CHECKPOINT", help=CHECKPOINT)
    _add_picture(parser, required=True)
    parser.add_argument("--head", type=int, metavar="N", help="one query head, from 0 (default: the mean over heads)")
    _add_scale(parser)
    _add_output(parser, "attention.png")


def _add_flow(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        _check(args)
        from hive_ds.analysis.flow import gradient_flow
        from hive_ds.analysis.flow_pictures import flow_figure
        from hive_ds.model.loading import load_vision_encoder

        samples, flows = _samples(args), []
        for checkpoint in args.checkpoints:
            subject, initial = _subject(checkpoint, args), None
            if args.initial is not None:
                initial = load_vision_encoder(args.initial, subject.model.dtype).to(subject.model.device).eval()
            flows.append(gradient_flow(subject, samples, knock_out=args.knock_out, initial=initial))
        values = {"samples": [sample.id for sample in samples], "models": [flow.values() for flow in flows]}
        _report(args, values, [line for flow in flows for line in flow.lines()], flow_figure(flows))

    parser = command(
        commands,
        "flow",
        run,
        "compare models by how much gradient reaches each encoder block",
        "All see the same samples: those of --data, or one picture.",
    )
    parser.add_argument("checkpoints", metavar="[NAME=]CHECKPOINT", nargs="+", help=CHECKPOINT)
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="MDS shards; the first samples with one image")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="of --data (default: %(default)s)")
    _add_picture(parser, required=False)
    parser.add_argument("--knock-out", action="store_true", help="the loss without each route, of HIVE models")
    parser.add_argument("--initial", metavar="ENCODER", help="the encoder at the start; how far has each block moved?")
    _add_output(parser, "flow.png")


def _add_picture(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--image", metavar="FILE", type=Path, required=required, help="the picture")
    parser.add_argument("--text", required=required, help="the caption or the answer; the loss is on it")
    parser.add_argument("--question", metavar="Q", help="asked before the answer, of a model that answers")


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scale",
        choices=("shared", "panel"),
        default="shared",
        help="one for all panels (default), or one each, which shows where but hides how much",
    )


def _add_output(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--out", metavar="PNG", type=Path, default=Path(name), help="the picture to write (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON instead of a table")


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    if not args.out.absolute().parent.is_dir():
        raise HiveError(f"out {args.out}: there is no folder {args.out.parent}")
    require_file_to_write(args.out)
    if args.text is not None and not args.text.strip():
        raise HiveError("text is empty: expected a caption or an answer")
    if "data" not in args:
        return
    pictured = args.image is not None and args.text is not None
    if (args.data is None) != pictured or (args.data is not None and (args.image or args.text or args.question)):
        raise HiveError("flow: expected either --data, or --image and --text (and --question)")
    require_positive(args, "samples")


def _subject(checkpoint: str, args: argparse.Namespace) -> Subject:
    """The model of ``[NAME=]CHECKPOINT``, which is named by its folder otherwise."""
    import transformers

    from hive_ds.analysis.samples import Subject
    from hive_ds.chat.loading import load_chat_model

    transformers.logging.set_verbosity_error()
    name, folder = split_name(checkpoint)
    chat = load_chat_model(folder)
    print(chat, file=sys.stderr)
    if args.question is not None and chat.template == "plain":
        raise HiveError(f"{folder} has learned captions (template plain): expected no --question")
    return Subject(checkpoint if name is None else name, chat.model, chat.processor, chat.template)


def _picture(args: argparse.Namespace) -> Sample:
    from hive_ds.analysis.samples import picture_sample

    return picture_sample(args.image, args.text, args.question)


def _samples(args: argparse.Namespace) -> list[Sample]:
    from hive_ds.analysis.samples import stored_samples

    return [_picture(args)] if args.data is None else stored_samples(args.data, args.samples)


def _report(args: argparse.Namespace, values: dict[str, Any], lines: list[str], picture: Image.Image) -> None:
    """Write the picture, and print the numbers."""
    from hive_ds.analysis.attention_pictures import save_picture

    save_picture(picture, args.out)
    print(json.dumps(values) if args.json else "\n".join(lines))
    print(f"wrote {args.out}", file=sys.stderr)
