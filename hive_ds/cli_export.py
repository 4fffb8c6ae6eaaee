"""``hive-ds export ...``: turn trained models into folders that other libraries load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import command


def add_export_commands(export: Any) -> None:
    """Add the commands to the group ``export``."""
    _add_encoder(export)
    _add_vlm(export)


def _add_encoder(export: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.export import export_encoder

        report = export_encoder(args.source, args.out, format=args.format, tail=args.tail, scores=args.scores)
        trained = f"{report.num_blocks} blocks, trained up to {report.trained_blocks}"
        if report.untrained is not None:
            trained = f"{report.num_blocks} blocks, none of them trained"
            print(f"warning: {report.untrained}")
        parity = f"features read back within {report.largest_difference:.1e} ({report.precision})"
        print(f"wrote {report.model_class} to {report.folder}: {trained}, {parity}, weights sha256 {report.sha256}")

    parser = command(
        export,
        "encoder",
        run,
        "write the trained vision encoder as a folder that plain transformers, timm or open_clip loads",
        "The folder is read back with that library and its features compared, to 1e-5, before the command says it is"
        " done. README.md in it is a model card: recipe, data, scores, cost, licences, versions, hash of the weights.",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of a run, a stage or a model")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument(
        "--format",
        choices=("transformers", "timm", "open_clip"),
        default="transformers",
        help="timm: SigLIP, CLIP, DINOv2; open_clip: SigLIP, CLIP; transformers: every encoder (default: %(default)s)",
    )
    parser.add_argument(
        "--tail",
        choices=("keep", "cut"),
        default="keep",
        help="blocks after the last routed one, final norm and pooling head, which no gradient reached: keep them as "
        "they were, so that nothing is lost, or cut them and end with a new norm (default: %(default)s)",
    )
    _add_scores(parser)


def _add_vlm(export: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.export import export_vlm

        report = export_vlm(args.source, args.out, scores=args.scores)
        print(
            f"wrote {report.folder}: stock transformers gives the same answers, encoder sha256 {report.vision_sha256}"
        )

    parser = command(
        export,
        "vlm",
        run,
        "write the LLaVA-style model of stages 4 and 5 as a folder that plain transformers loads and generates from",
        "Prompt tokens, pixels and greedy answers are compared with those of the code that trained it before the"
        " command says it is done.",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of a run, a stage or a model")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    _add_scores(parser)


def _add_scores(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scores",
        metavar="FILE",
        type=Path,
        help="results for the model card, JSON (default: every results.json in the run that judged these weights)",
    )
