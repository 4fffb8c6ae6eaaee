"""``hive-ds data ...``: make training data and look at it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_ds.cli_parts import command
from hive_ds.errors import HiveError

if TYPE_CHECKING:
    from hive_ds.data.inspection.text import TextSettings


def add_data_commands(data: Any) -> None:
    """Add the commands to the group ``data``."""
    _add_scenes(data)
    _add_convert(data)
    _add_verify(data)
    _add_stats(data)
    _add_show(data)
    _add_recaption(data)


def _add_scenes(data: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.data.scenes_samples import write_scenes

        folders = write_scenes(args.out, args.num, args.seed, size=args.size)
        print(f"wrote {args.num} scenes to {folders.train}; held-out ones and text beside it")

    parser = command(
        data,
        "scenes",
        run,
        "draw captioned scenes of coloured shapes, with questions and answers",
        "Writes MDS shards to OUT/train, validation, questions, text and text_validation; one seed, one set of bytes.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--num", type=int, default=4000, help="training pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels (default: %(default)s)")


def _add_convert(data: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.data.convert import convert_llava

        print(convert_llava(args.json, args.images, args.out))

    parser = command(
        data,
        "convert",
        run,
        "convert a LLaVA-format JSON file and its image folder to MDS shards",
        "Samples that cannot be used are left out and listed in OUT/rejects.jsonl with the reason.",
    )
    parser.add_argument("json", metavar="JSON", type=Path, help="list of {id, image, conversations}")
    parser.add_argument("images", metavar="IMAGES", type=Path, help="folder that the image paths start at")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")


def _add_verify(data: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from hive_ds.data.inspection.verify import verify

        report = verify(args.folder, _text_settings(args), workers=args.workers)
        print(report)
        return 0 if report.sound else 1

    parser = command(
        data,
        "verify",
        run,
        "check every file, sample and image of a folder of MDS shards",
        "Exit code 0 if the folder is sound, 1 if not. Writes nothing.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of MDS shards")
    _add_text_options(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")


def _add_stats(data: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.data.inspection.stats import measure_folder
        from hive_ds.data.inspection.text import NO_LIMIT, TextSettings

        settings = TextSettings(args.tokenizer, args.template, NO_LIMIT) if args.tokenizer else None
        if args.out and args.out.suffix != ".html":
            raise HiveError(f"--out {args.out}: expected a name that ends in .html")
        stats = measure_folder(args.folder, settings)
        print(stats)
        if args.out:
            print(f"\nwrote {args.out} and {stats.write(args.out)}")

    parser = command(
        data,
        "stats",
        run,
        "print histograms of text lengths, turns and images of a folder of MDS shards",
        "Of images only the headers are read.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of MDS shards")
    _add_tokenizer(parser)
    parser.add_argument("--out", metavar="PAGE.html", type=Path, help="write a page, too, and PAGE.json beside it")


def _add_show(data: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.data.inspection.show import write_page

        settings = _text_settings(args)
        shown = write_page(args.folder, args.out, number=args.num, seed=args.seed, settings=settings)
        print(f"wrote {len(shown)} samples to {args.out}: open it in a browser, it fetches nothing")

    parser = command(
        data,
        "show",
        run,
        "write a page of samples of a folder of MDS shards: pictures, text, tokens",
        "With --tokenizer: which tokens carry loss, where the images stand, what is cut.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of MDS shards")
    parser.add_argument("out", metavar="OUT.html", type=Path, help="the page")
    parser.add_argument("--num", type=int, default=24, help="samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    _add_text_options(parser)


def _add_recaption(data: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.data.recaption import CaptionerSettings, recaption

        settings = CaptionerSettings(args.captioner, args.prompt, args.max_new_tokens, args.device, args.dtype)
        print(recaption(args.folder, args.out, settings, batch_size=args.batch_size))

    parser = command(
        data,
        "recaption",
        run,
        "let a captioner describe the pictures of a folder of MDS shards",
        "Writes a JSONL that 'data convert --captions' reads. Started again, it does only what OUT.jsonl lacks.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of MDS shards")
    parser.add_argument(
        "out", metavar="OUT.jsonl", type=Path, help="one line {id, caption, captioner, prompt} a sample"
    )
    parser.add_argument(
        "--captioner", metavar="MODEL", required=True, help="name or folder of BLIP, Florence-2, LLaVA, ..."
    )
    parser.add_argument("--prompt", help="what to ask; for Florence-2 a task as <MORE_DETAILED_CAPTION>, for BLIP none")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at once (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of a caption (default: %(default)s)")
    parser.add_argument("--device", help="as cuda:1 or cpu (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="bf16 or fp32 (default: bf16 on a GPU, fp32 on the CPU)")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="T", help="name or folder of a tokenizer: look at tokens, too")
    parser.add_argument("--template", default="plain", help="plain or chat, as data.template (default: %(default)s)")


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    _add_tokenizer(parser)
    parser.add_argument(
        "--max-length", metavar="N", type=int, default=2048, help="as data.max_length (default: %(default)s)"
    )


def _text_settings(args: argparse.Namespace) -> TextSettings | None:
    """What the options of `_add_text_options` say; None without a tokenizer."""
    from hive_ds.data.inspection.text import TextSettings

    return TextSettings(args.tokenizer, args.template, args.max_length) if args.tokenizer else None
