"""``hive-ds eval``: benchmarks on a checkpoint, from local copies."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import command, require_positive
from hive_ds.errors import HiveError


def add_eval_command(commands: Any) -> None:
    """Add the command ``eval``."""
    parser = command(
        commands,
        "eval",
        _run,
        "score a checkpoint on benchmarks, from local copies, without a network",
        "MME, GQA, OK-VQA, ScienceQA, TextVQA and POPE through lmms-eval. Before it, models that look at the labels"
        " must score what theory says. Several GPUs: torchrun --nproc-per-node N --no-python hive-ds eval ...",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        nargs="?",
        help="folder of a run (its last stage), a stage or a model",
    )
    parser.add_argument(
        "--tasks", required=True, metavar="A,B", help="mme, gqa, ok_vqa, scienceqa, ... (docs/evaluation.md)"
    )
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="of local copies, as on the hub")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for results.json, the answers and the task files")
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N questions of each benchmark only")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="B", help="questions together (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: this rank's GPU, or the CPU)")
    parser.add_argument(
        "--dtype", default="float32", help="of the weights; give bfloat16 on a GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--encoder", type=Path, metavar="FOLDER", help="an exported encoder: stop unless the checkpoint holds this one"
    )
    tests = parser.add_mutually_exclusive_group()
    tests.add_argument("--self-test", action="store_true", help="run the self-tests; the only thing without CHECKPOINT")
    tests.add_argument("--no-self-test", action="store_true", help="trust data and scorers: they were tested before")


def _run(args: argparse.Namespace) -> None:
    if args.checkpoint is None and not args.self_test:
        raise HiveError("no CHECKPOINT: expected one, or --self-test")
    require_positive(args, "limit", "batch_size")
    if importlib.util.find_spec("lmms_eval") is None:
        raise HiveError('lmms-eval is not installed; install it with: pip install -e ".[eval]"')
    from hive_ds.evaluation.benchmarks.run import Request, evaluate

    evaluate(
        Request(
            benchmarks=args.tasks.split(","),
            data=args.data,
            checkpoint=args.checkpoint,
            out=args.out,
            limit=args.limit,
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            encoder=args.encoder,
            self_test=not args.no_self_test,
        )
    )
