"""Where the ranks of a Slurm step meet, when nothing has said so.

torchrun and most launchers export MASTER_ADDR and MASTER_PORT; srun and ``deepspeed --launcher slurm`` do not.
All ranks of a step read the same variables of Slurm, and so come to the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

_FIRST_PORT, _PORTS = 12000, 20000
"""Ports below those that the kernel hands out by itself (from 32768)."""


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


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "0")
    return int(value) if value.isdecimal() else 0
