"""``hive-ds data ...``: make training data and look at it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import command


def add_data_commands(data: Any) -> None:
    """Add the commands to the group ``data``."""
    _add_scenes(data)
    _add_convert(data)


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
        from hive_ds.data.sources import Columns, SourceOptions, open_source

        columns = Columns(args.id_column, args.image_column, args.text_column, args.conversations_column)
        source = open_source(SourceOptions(args.source, args.format, args.images, args.split, columns), args.preset)
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
        print(f"next: hive-ds data verify {args.out}, then train with --set data.train={args.out}")

    parser = command(
        data,
        "convert",
        run,
        "convert a data set to MDS shards",
        "Every image is decoded; samples that cannot be used are left out and listed in OUT/rejects.jsonl with the"
        " reason. Stopped or killed, the same command goes on where it was. The output does not depend on --workers.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="LLaVA .json or .jsonl, .csv or .tsv of paths and captions, folder or pattern of WebDataset .tar, folder"
        " of .parquet or saved by datasets, name on the Hugging Face hub, folder of images",
    )
    parser.add_argument("out", metavar="OUT", help="new folder, or s3://, gs://, ... URL")
    _add_source_options(parser)
    _add_output_options(parser)


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument("--preset", metavar="NAME", help="cc3m, llava-pretrain, llava-next or sharegpt4v")
    group.add_argument("--format", metavar="F", help="llava, table, webdataset, huggingface or image_folder, untold")
    group.add_argument("--images", metavar="PATH", help="folder, .zip or .tar that image paths start at")
    group.add_argument("--split", help="of a Hugging Face dataset (default: train)")
    group.add_argument("--id-column", metavar="NAME", help="names of fields, where they are not the usual ones")
    group.add_argument("--image-column", metavar="NAME")
    group.add_argument("--text-column", metavar="NAME", help="captions: pick the alt text or a synthetic one here")
    group.add_argument("--conversations-column", metavar="NAME")
    group.add_argument(
        "--captions",
        metavar="JSONL",
        type=Path,
        help="captions that replace all texts (hive-ds data recaption)",
    )


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
