"""``hive-ds data ...``: make training data and look at it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_ds.cli_parts import command
from hive_ds.errors import HiveError

if TYPE_CHECKING:
    from hive_ds.data.inspection.text import TextSettings
    from hive_ds.data.sources import Columns, Source

SOURCES = (
    "LLaVA .json or .jsonl, .csv or .tsv of paths and captions, folder or pattern of WebDataset .tar, folder of"
    " .parquet or saved by datasets, name on the Hugging Face hub, folder of images"
)


def add_data_commands(data: Any) -> None:
    """Add the commands to the group ``data``."""
    _add_scenes(data)
    _add_convert(data)
    _add_verify(data)
    _add_stats(data)
    _add_show(data)
    _add_recaption(data)
    _add_speed(data)


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
        from hive_ds.data.convert import convert
        from hive_ds.data.convert_images import ImageOptions
        from hive_ds.data.convert_options import ConvertOptions
        from hive_ds.data.sources import Columns

        texts = args.captions is None
        columns = Columns(args.id_column, args.image_column, args.text_column, args.conversations_column, texts)
        source = _open_source(args, columns)
        given = {"workers": args.workers} if args.workers is not None else {}
        options = ConvertOptions(
            part_size=args.part_size,
            images=ImageOptions(args.resize, args.image_format, args.quality),
            max_reject_share=args.max_reject_share,
            limit=args.limit,
            shuffle_seed=args.shuffle,
            compression=args.compression,
            captions=args.captions,
            **given,
        )
        print(f"{args.out}: {convert(source, args.out, options)}")
        out = shlex.quote(args.out)
        print(f"next: hive-ds data verify {out}, then train with --set data.train={out}")

    parser = command(
        data,
        "convert",
        run,
        "convert a data set to MDS shards",
        "Every image is decoded; samples that cannot be used are left out and listed in OUT/rejects.jsonl with the"
        " reason. Stopped or killed, the same command goes on where it was. The output does not depend on --workers.",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCES)
    parser.add_argument("out", metavar="OUT", help="new folder, or s3://, gs://, ... URL")
    group = _add_source_options(parser)
    group.add_argument("--text-column", metavar="NAME", help="captions: pick the alt text or a synthetic one here")
    group.add_argument("--conversations-column", metavar="NAME", help="turns, as LLaVA has them")
    group.add_argument(
        "--captions",
        metavar="JSONL",
        type=Path,
        help="captions in place of all texts, which may be missing (hive-ds data recaption)",
    )
    _add_output_options(parser)


def _open_source(args: argparse.Namespace, columns: Columns) -> Source:
    from hive_ds.data.sources import SourceOptions, open_source

    return open_source(SourceOptions(args.source, args.format, args.images, args.split, columns), args.preset)


def _add_source_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what names the samples and images of a SOURCE; return their group, for more."""
    group = parser.add_argument_group("source")
    group.add_argument("--preset", metavar="NAME", help="cc3m, llava-pretrain, llava-next or sharegpt4v")
    group.add_argument(
        "--format", metavar="F", help="llava, table, webdataset, huggingface or image_folder (default: by SOURCE)"
    )
    group.add_argument("--images", metavar="PATH", help="folder, .zip or .tar that image paths start at")
    group.add_argument("--split", help="of a Hugging Face dataset (default: train)")
    group.add_argument(
        "--id-column", metavar="NAME", help="ids; these options name fields whose names are not the usual ones"
    )
    group.add_argument("--image-column", metavar="NAME", help="images; none for text alone")
    return group


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    group.add_argument("--limit", type=int, metavar="N", help="convert the first N samples alone")
    group.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the samples")
    group.add_argument("--resize", type=int, metavar="PIXELS", help="shrink images to a shorter side of so many")
    group.add_argument("--image-format", metavar="F", help="store images as jpeg, webp or png where that is smaller")
    group.add_argument("--quality", type=int, default=90, help="of jpeg and webp (default: %(default)s)")
    group.add_argument("--compression", metavar="C", help="of shards, as zstd")
    group.add_argument("--part-size", type=int, default=1000, metavar="N", help="samples a part (default: %(default)s)")
    group.add_argument(
        "--max-reject-share", type=float, default=0.05, metavar="X", help="stop past this share (default: %(default)s)"
    )


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
        from hive_ds.data.mds.reading import open_folder
        from hive_ds.data.recaption import CaptionerSettings, recaption
        from hive_ds.data.sources import Columns

        settings = CaptionerSettings(args.captioner, args.prompt, args.max_new_tokens, args.device, args.dtype)
        is_shards = args.format is None and Path(args.source, "index.json").is_file()
        columns = Columns(args.id_column, args.image_column, texts=False)
        source = open_folder(args.source) if is_shards else _open_source(args, columns)
        print(recaption(source, args.out, settings, batch_size=args.batch_size))

    parser = command(
        data,
        "recaption",
        run,
        "let a captioner describe the pictures of a data set, which needs no texts",
        "Writes a JSONL that 'data convert --captions' reads. Started again, it does only what OUT.jsonl lacks.",
    )
    parser.add_argument("source", metavar="SOURCE", help=f"folder of MDS shards, or as for convert: {SOURCES}")
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
    _add_source_options(parser)


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


def _add_speed(data: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.data.images import auto_image_processor
        from hive_ds.data.speed import measure_speed

        print(measure_speed(args.folder, auto_image_processor(args.image_processor), args.seconds))

    parser = command(
        data,
        "speed",
        run,
        "time decoding and preprocessing on one core",
        "Beside it: a plain loop of Pillow and the Hugging Face image processor.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="MDS shards")
    parser.add_argument("--image-processor", required=True, metavar="MODEL", help="folder or hub name of an encoder")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each way (default: %(default)s)")
