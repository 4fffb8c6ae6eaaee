"""``hive-ds report``: one page of a run, or of several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import command


def add_report_command(commands: Any) -> None:
    """Add the command ``report``."""

    def run(args: argparse.Namespace) -> None:
        from hive_ds.report.page import write_report

        print(f"page: {write_report(args.runs, args.out).resolve()}")

    parser = command(
        commands,
        "report",
        run,
        "write a page of a run: recipe, curves, results, cost, environment, warnings",
        "Several runs stand side by side: what differs in their recipes, curves over each other. The page needs no"
        " network and no other file; runs that are not finished, or lack files, are shown as far as they go.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run, which holds stage1, ...")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page (default: RUN/report.html; of several runs report.html)"
    )
