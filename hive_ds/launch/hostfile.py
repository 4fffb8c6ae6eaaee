"""Hostfiles, and the environment that DeepSpeed's launcher carries to their hosts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hive_ds.errors import HiveError

CARRIED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|(CUDA|DS|GLOO|HF|HIVE|HUGGINGFACE|NCCL|OMP|PYTHON|TOKENIZERS|TORCH|TRITON|WANDB)"
    r"(_\w+|[A-Z]\w*))"
)
"""Variables that ranks need, by name."""

_OWN = re.compile(r"CUDA_VISIBLE_DEVICES|HIVE_ATTEMPT|HIVE_STOP_AT|.*(TOKEN|SECRET|PASSWORD|_KEY)")
"""But not these: they belong to one host or one start, or are secrets, which a file must not hold."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: ``NAME slots=N``."""

    name: str
    """As ssh takes it: with a user before an @, where one is named."""
    slots: int

    @property
    def address(self) -> str:
        """As other hosts call it."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in order.

    DeepSpeed takes a missing file for a run on this host alone; here it is an error.

    Raises:
        HiveError: no such file, no host in it, a line that is no host, or a host twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise HiveError(f"hostfile {path}: cannot be read ({reason}); expected lines NAME slots=N") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if not match:
            raise HiveError(f"hostfile {path}, line {number}: {line!r}; expected NAME slots=N")
        if match[1] in {host.name for host in hosts}:
            raise HiveError(f"hostfile {path}, line {number}: host {match[1]} is there twice; give it one line")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise HiveError(f"hostfile {path}: holds no host; expected lines NAME slots=N")
    return hosts


def carried_variables(env: Mapping[str, str]) -> dict[str, str]:
    """What of ``env`` the ranks of other hosts need."""
    names = sorted(name for name in env if CARRIED.fullmatch(name) and not _OWN.fullmatch(name))
    return {name: env[name] for name in names if env[name].strip()}


def write_deepspeed_env(path: Path, variables: Mapping[str, str]) -> None:
    """Write the file that DeepSpeed's launcher reads: NAME=VALUE lines and nothing else, which would crash it.

    Raises:
        HiveError: a value that would reach the other hosts changed: their shells read it between double quotes, after
            pdsh has put in its own for a percent sign.
    """
    for name, value in variables.items():
        if re.search(r'["$`\\%\n]', value):
            raise HiveError(f"variable {name} is {value!r}, which the launcher cannot carry; change or unset it")
    path.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
