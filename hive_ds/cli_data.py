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
