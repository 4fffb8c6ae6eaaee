"""``hive-ds supervise -- COMMAND``: run a training command until its stage is done."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import command, require_positive
from hive_ds.errors import HiveError


def add_supervise(commands: Any) -> None:
    """Add the command."""

    def run(args: argparse.Namespace) -> int:
        from hive_ds.launch.supervise import Supervisor, stage_folder

        require_positive(args, "failures")
        for name in ("restarts", "pause"):
            if not getattr(args, name) >= 0:
                raise HiveError(f"--{name} {getattr(args, name)}: expected a number of at least 0")
        folder = args.folder or stage_folder(args.train)
        limits = {"restarts": args.restarts, "failures": args.failures, "pause": args.pause}
        return Supervisor(args.train, folder, **limits).run()

    parser = command(
        commands,
        "supervise",
        run,
        "start a training command again until its stage is done: hive-ds supervise -- deepspeed --module hive_ds.train"
        " ...",
        "For machines without Slurm; COMMAND may be deepspeed, torchrun or hive-ds hosts run. What a try leaves behind"
        " on this machine is killed before the next one, which goes on from the newest whole checkpoint. SIGTERM,"
        " SIGINT (Ctrl-C) and SIGUSR1 ask for a checkpoint and a stop; the second SIGTERM or SIGINT ends it at once."
        " Exit code: 0 done, 2 wrong input, 85 stopped on request, 1 given up.",
    )
    parser.add_argument(
        "--restarts", type=int, default=100, metavar="N", help="start again at most so often (default: %(default)s)"
    )
    parser.add_argument(
        "--failures",
        type=int,
        default=3,
        metavar="K",
        help="give up after K failures in a row without a new checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--pause", type=float, default=10, metavar="S", help="seconds between two tries (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="RUN/stageN, where COMMAND does not name it by --run (or --run-folder) and --stage"
    )
    parser.add_argument("train", nargs="+", metavar="COMMAND", help="training command, after --")
