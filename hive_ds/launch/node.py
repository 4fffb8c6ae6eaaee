"""Start the ranks of one host: ``python -m hive_ds.launch.node --nodes N --node-rank I ... -- ARGUMENTS``.

It is torchrun with three things more: what is installed is written down, it can end with the ssh that started it, and
the exit code is that of the first rank that failed, where torchrun's is always 1. A job script can so tell wrong input
(2) and a stop that was asked for (85) from a crash.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from hive_ds.launch.meeting import late_is_said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``hive_ds.train`` on this host's ranks until all have ended; returns the first failed rank's exit code."""
    options = _parse(arguments)
    if options.packages is not None and options.node_rank == 0:
        write_packages(options.packages)
    if options.tied:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    # torchrun would give every rank a single thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // options.ranks)))
    command = [
        *("--nnodes", str(options.nodes), "--node-rank", str(options.node_rank)),
        *("--nproc-per-node", str(options.ranks)),
        *("--master-addr", options.master, "--master-port", str(options.port)),
        *("--module", "hive_ds.train", *options.train),
    ]
    try:
        with late_is_said(f"host {options.node_rank}, {socket.gethostname()},", options.master, options.port):
            torchrun(command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # as a shell counts signals
        print(f"rank {rank} was the first to end, with exit code {code}", file=sys.stderr, flush=True)
        return code
    return 0


def _end_with_stdin() -> None:
    """Wait until nobody holds the other end of stdin, and end as if asked to."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def write_packages(path: Path) -> None:
    """Write name and version of every installed Python package, one a line."""
    lines = {f"{one.metadata['Name']}=={one.version}\n" for one in distributions()}
    path.write_text(f"# Python {sys.version.split()[0]}, {sys.executable}\n" + "".join(sorted(lines, key=str.lower)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hive_ds.launch.node", description="Start the ranks of one host.")
    parser.add_argument("--nodes", type=int, required=True, help="hosts of the run")
    parser.add_argument("--node-rank", type=int, required=True, help="number of this host, from 0")
    parser.add_argument("--ranks", type=int, required=True, help="processes on this host")
    parser.add_argument("--master", required=True, help="name of host 0")
    parser.add_argument("--port", type=int, required=True, help="a free port of host 0")
    parser.add_argument("--packages", type=Path, help="file for the list of installed packages, written by host 0")
    parser.add_argument("--tied", action="store_true", help="end when stdin closes: the ssh that started it is gone")
    parser.add_argument("train", nargs="+", metavar="ARGUMENT", help="of hive_ds.train, after --")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
