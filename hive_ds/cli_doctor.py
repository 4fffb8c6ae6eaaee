"""``hive-ds doctor``: is everything there that training needs, and what to do where it is not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import add_overrides, command, port_number
from hive_ds.errors import HiveError


def add_doctor_command(commands: Any) -> None:
    """Add the command ``doctor``."""
    parser = command(
        commands,
        "doctor",
        _run,
        "look at versions, GPUs, network, disks, hosts, data and run folder, and say what to do about each finding",
        "Takes less than a minute. Exit code 1 if there is a problem; warnings alone are 0.",
    )
    parser.add_argument("--hostfile", type=Path, metavar="F", help="also ask these hosts over ssh: lines NAME slots=N")
    parser.add_argument("--recipe", metavar="R", help="also look at the data, models and batch sizes that it names")
    add_overrides(parser, "override one value of --recipe; repeatable")
    parser.add_argument("--run", dest="run_folder", type=Path, metavar="FOLDER", help="also look at a run's folder")
    parser.add_argument("--data", metavar="FOLDER", help="also look at a folder of MDS shards, for data.train")
    parser.add_argument(
        "--port", type=port_number, default=29500, help="that rank 0 is to listen on (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _run(args: argparse.Namespace) -> int:
    from hive_ds.doctor.examine import Patient, examine
    from hive_ds.launch.hostfile import read_hostfile
    from hive_ds.recipe import load_recipe

    if args.overrides and args.recipe is None:
        raise HiveError(f"--set {args.overrides[0]}: needs --recipe, whose value it overrides")
    diagnosis = examine(
        Patient(
            hosts=read_hostfile(args.hostfile) if args.hostfile is not None else (),
            recipe=load_recipe(args.recipe, args.overrides) if args.recipe is not None else None,
            run=args.run_folder,
            data=args.data,
            port=args.port,
        )
    )
    print(json.dumps(diagnosis.as_dict(), indent=1) if args.json else diagnosis)
    return diagnosis.exit_code
