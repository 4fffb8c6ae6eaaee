"""Where the ranks of a Slurm step meet, when nothing has said so.

torchrun and most launchers export MASTER_ADDR and MASTER_PORT; srun and ``deepspeed --launcher slurm`` do not.
All ranks of a step read the same variables of Slurm, and so come to the same answer.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from threading import Timer

_FIRST_PORT, _PORTS = 12000, 20000
"""Ports below those that the kernel hands out by itself (from 32768)."""
PATIENCE = 30.0
"""Seconds that ranks may take to start before those who wait say so; torch itself waits for half an hour in silence."""


def set_meeting_point(env: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT where they are missing and this process belongs to a Slurm step of several."""
    if "SLURM_STEP_NODELIST" in env and "SLURM_JOB_ID" in env:
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(meeting_port(env)))


def first_host(nodes: str) -> str:
    """The first host of a Slurm list such as ``gpu[03-07,12],login2``; its rank 0 is there."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)


def meeting_port(env: Mapping[str, str]) -> int:
    """A port of this step's own: jobs on one node, attempts at a job and steps of an attempt should not meet."""
    job, restart, step = (_number(env, f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return _FIRST_PORT + (job * 131 + restart * 13 + step) % _PORTS


@contextmanager
def late_is_said(who: str, host: str, port: int, *, waited_for: str = "", patience: float = PATIENCE) -> Iterator[None]:
    """Say once on stderr for whom ``who`` waits, if what is done inside takes longer than ``patience`` seconds.

    Args:
        who: this process.
        host: name or address of rank 0's host.
        port: that the ranks meet at.
        waited_for: said on ``host`` itself: who is to come. Elsewhere nothing is said once ``host`` answers.
        patience: seconds.
    """

    def say() -> None:
        fault = "" if waited_for else _fault_of(host, port)
        if waited_for or fault:
            whom = waited_for or "rank 0"
            print(f"{who} still waits for {whom} at {host}:{port}{fault}", file=sys.stderr, flush=True)

    timer = Timer(patience, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _fault_of(host: str, port: int) -> str:
    """Why nobody is met there, or nothing if somebody is."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return f": {error.strerror or error}"
    return ""


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "0")
    return int(value) if value.isdecimal() else 0
