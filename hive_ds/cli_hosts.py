"""``hive-ds hosts ...``: check the hosts of a hostfile, carry the environment to them, and run on them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hive_ds.cli_parts import command, port_number


def add_host_commands(hosts: Any) -> None:
    """Add the commands to the group ``hosts``."""
    _add_check(hosts)
    _add_env(hosts)
    _add_run(hosts)


def _add_check(hosts: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from hive_ds.launch.hostfile import read_hostfile
        from hive_ds.launch.hosts import check_hosts

        found = read_hostfile(args.hostfile)
        faults = check_hosts(found, folder=args.folder, port=args.port)
        print(
            "\n".join(map(str, faults))
            or f"{len(found)} hosts, {sum(host.slots for host in found)} slots: no fault found"
        )
        return 1 if faults else 0

    parser = command(
        hosts,
        "check",
        run,
        "check the hosts of a hostfile before a run",
        "Over ssh: reachable, the same Python and versions, slots, a free port, /dev/shm, disk, clock. One line a"
        " fault, and exit code 1 if there is any.",
    )
    _add_hostfile(parser)
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="of the run, shared by all hosts (default: this folder)"
    )


def _add_env(hosts: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.launch.hostfile import carried_variables, read_hostfile, write_deepspeed_env

        read_hostfile(args.hostfile)
        variables = carried_variables(os.environ)
        write_deepspeed_env(args.out, variables)
        print(f"wrote {args.out}, which deepspeed --hostfile reads in this folder: {' '.join(variables)}")

    parser = command(
        hosts,
        "env",
        run,
        "write the variables that deepspeed --hostfile carries to the other hosts",
        "By itself it carries few. No secrets are written: log in to services on every host instead.",
    )
    _add_hostfile(parser, port=False)
    parser.add_argument("--out", type=Path, default=Path(".deepspeed_env"), help="file (default: %(default)s)")


def _add_run(hosts: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from hive_ds.launch.hostfile import read_hostfile
        from hive_ds.launch.hosts import run_on_hosts

        return run_on_hosts(read_hostfile(args.hostfile), args.train, port=args.port)

    parser = command(
        hosts,
        "run",
        run,
        "train on the hosts of a hostfile: hive-ds hosts run HOSTFILE -- --recipe R --stage N --run-folder RUN",
        "One ssh a host, with this environment and folder. When a rank dies, all hosts end within seconds.",
    )
    _add_hostfile(parser)
    parser.add_argument("train", nargs="+", metavar="ARGUMENT", help="of hive_ds.train, after --")


def _add_hostfile(parser: argparse.ArgumentParser, *, port: bool = True) -> None:
    parser.add_argument("hostfile", metavar="HOSTFILE", type=Path, help="lines NAME slots=N; the first holds rank 0")
    if port:
        parser.add_argument(
            "--port", type=port_number, default=29500, help="that rank 0 is to listen on (default: %(default)s)"
        )
