"""``hive-ds checkpoint ...``: list, check and move the checkpoints of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import command


def add_checkpoint_commands(checkpoints: Any) -> None:
    """Add the commands to the group ``checkpoint``."""
    _add_list(checkpoints)
    _add_verify(checkpoints)
    _add_reshard(checkpoints)


def _add_list(checkpoints: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.training.checkpoint_tools import list_checkpoints, listing

        print(listing(list_checkpoints(args.run_folder)))

    parser = command(
        checkpoints,
        "list",
        run,
        "list a run's checkpoints, and which one a resume would take",
        "Reads every file, to say which checkpoints are whole.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run")


def _add_verify(checkpoints: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from hive_ds.training.checkpoint_tools import verify_checkpoints

        found = verify_checkpoints(args.path)
        for path, faults in found:
            print("\n".join(f"{path}: {fault}" for fault in faults) or f"{path}: whole")
        return 2 if any(faults for _, faults in found) else 0

    parser = command(
        checkpoints,
        "verify",
        run,
        "check every file of checkpoints against its SHA-256",
        "One line a fault, and exit code 2 if there is any.",
    )
    parser.add_argument("path", metavar="RUN|CHECKPOINT", type=Path, help="folder of a run, a stage or a checkpoint")


def _add_reshard(checkpoints: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.training.checkpoint_tools import reshard

        reshard(args.checkpoint, args.out, args.ranks)
        print(f"wrote {args.out} for {args.ranks} ranks")

    parser = command(
        checkpoints,
        "reshard",
        run,
        "write a checkpoint again, cut for another number of ranks",
        "Not needed to resume: any number of ranks reads any checkpoint. It makes a copy in fewer files, or in one file"
        " for each rank of a ZeRO-3 run to come; a resume from it is the same to the bit.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="RUN/stageN/checkpoints/step-000100, for example"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="files to cut it into")
