"""Dumps of ranks in a run that hangs, and what they say together."""

from __future__ import annotations

import faulthandler
import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hive_ds.files import write_whole
from hive_ds.training.place import main_frame, one_line

_MOST_NAMED = 8


@dataclass(frozen=True)
class Dump:
    """One rank's place (`Place.describe`) and the seconds since it last changed."""

    rank: int
    idle: float
    host: str
    pid: int
    step: int
    phase: str
    module: str | None
    samples: list[str]
    in_collective: bool
    marks: int

    def line(self) -> str:
        """All of it in one line."""
        waits = "waits for other ranks" if self.in_collective else "does not wait for other ranks"
        return f"rank {self.rank} on {self.host}: no progress for {self.idle:.0f} s in {one_line(vars(self))}; {waits}"


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank's dump stands."""
    return folder / f"rank-{rank:05d}.txt"


def free_folder(folder: Path) -> Path:
    """The first of ``hang``, ``hang-2``, ``hang-3``, ... that no earlier attempt has dumped into."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def write_dump(folder: Path, dump: Dump) -> None:
    """Write a rank's values, one a line, the main thread's stack, and those of all threads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(folder, dump.rank)
    stacks = path.with_name(f".{path.name}.stacks")
    with stacks.open("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read()
    stacks.unlink()
    values = "".join(f"{name}: {json.dumps(value)}\n" for name, value in vars(dump).items())
    main = "".join(traceback.format_stack(main_frame()))
    write_whole(path, f"{values}\nMain thread (innermost call last):\n{main}\n{text}")


def dumped_ranks(folder: Path) -> list[int]:
    """Ranks whose dumps are there."""
    return sorted(int(path.stem.removeprefix("rank-")) for path in folder.glob("rank-*.txt"))


def read_dumps(folder: Path) -> dict[int, Dump]:
    """All dumps by rank, without their stacks."""
    dumps = {}
    for rank in dumped_ranks(folder):
        lines = file_of(folder, rank).read_text().split("\n\n", 1)[0].splitlines()
        dumps[rank] = Dump(**{name: json.loads(value) for name, value in (line.split(": ", 1) for line in lines)})
    return dumps


def verdict(dumps: Mapping[int, Dump], hosts: Sequence[str]) -> str:
    """Which ranks the others wait for: those that do not answer, do not wait themselves, or are behind.

    Those that are behind and do not wait come first: a rank that waits for its own GPU, which waits for others, looks
    as if it worked.
    """
    silent = [rank for rank in range(len(hosts)) if rank not in dumps]
    if silent:
        return f"no answer from {_names(silent, hosts)}: stopped, ended, or cut off from the folder of the run"
    busy = [rank for rank, dump in dumps.items() if not dump.in_collective]
    fewest = min(dump.marks for dump in dumps.values())
    behind = [rank for rank, dump in dumps.items() if dump.marks == fewest]
    for culprits in ([rank for rank in busy if rank in behind], busy, behind):
        if culprits and len(culprits) < len(hosts):
            where = one_line(vars(dumps[culprits[0]]))
            return f"the others wait for {_names(culprits, hosts)}: {where}"
    if len(hosts) == 1:
        return f"the only rank hangs: {one_line(vars(dumps[0]))}"
    return f"all ranks are at the same place, {one_line(vars(dumps[0]))}: the network, or the same fault on all"


def _names(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = [f"rank {rank} on {hosts[rank]}" for rank in ranks[:_MOST_NAMED]]
    more = len(ranks) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
