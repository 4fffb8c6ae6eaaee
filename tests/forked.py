"""Ranks forked from a process that has imported everything: each begins at once, not after 15 s of CPU time.

For tests that are not about launchers. Variables, output and exit codes are those that torchrun would give.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from torch.distributed import TCPStore
from tqdm import tqdm

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "hive_ds.train",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # which DeepSpeed imports for every optimizer, Inductor with it
        "torch.utils.tensorboard",
        "transformers.models.llama.modeling_llama",
        "transformers.models.siglip.modeling_siglip",
    ]
)


@dataclass(frozen=True)
class Ended:
    """What the ranks left, in the order in which they wrote it."""

    returncode: int
    """The first that is not 0."""
    stdout: str
    stderr: str


def run_forked(
    entry: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    num_ranks: int,
    timeout: float,
    kill_when: Callable[[], bool] | None = None,
) -> Ended:
    """Call ``module:function`` with ``arguments`` in each of ``num_ranks`` processes; one that fails ends the others.

    Args:
        entry: of a function whose result is the exit code.
        arguments: of that function, as one list.
        env: all variables but a rank's own. Modules that are imported already have read their own before.
        num_ranks: processes.
        timeout: seconds after which they are killed.
        kill_when: they are killed without warning, as soon as it says so.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun: no port is free for a while
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        ranks = []
        for rank in range(num_ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            variables = {**env, **meeting, **{name: str(value) for name, value in place.items()}}
            ranks.append(start_rank(entry, arguments, variables, outputs))
        deadline = time.monotonic() + timeout
        running = ranks
        while running and not any(rank.exitcode for rank in ranks):
            left = deadline - time.monotonic()
            if left <= 0 or (kill_when and kill_when()):
                break
            wait([rank.sentinel for rank in running], 0.005 if kill_when else left)  # of none, it would take all of it
            running = [rank for rank in ranks if rank.exitcode is None]
        late = time.monotonic() >= deadline
        codes = [rank.exitcode for rank in ranks if rank.exitcode]
        for rank in running if late else []:
            with suppress(ProcessLookupError):  # it has ended by now
                os.kill(rank.pid, signal.SIGABRT)  # faulthandler says where it stands
            rank.join(1)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        stdout, stderr = (path.read_text() for path in outputs)
    assert not late, f"not through after {timeout} s\n{stdout}\n{stderr}"
    return Ended(codes[0] if codes else 0, stdout, stderr)


def start_rank(
    entry: str, arguments: Sequence[str], variables: Mapping[str, str], outputs: Sequence[Path]
) -> ForkServerProcess:
    """One process alone, with these variables; its output and its errors are added to the two files."""
    process = CONTEXT.Process(target=_rank, args=(entry, list(arguments), dict(variables), list(outputs)))
    process.start()
    return process


def _rank(entry: str, arguments: list[str], variables: dict[str, str], outputs: list[Path]) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    faulthandler.enable(file=2)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # read from TMPDIR again
    tqdm.set_lock(threading.RLock())  # its own is shared by all that this server forks; one may be killed holding it
    multiprocessing.set_start_method("fork", force=True)  # of its loader's workers, as in a process of its own
    module, function = entry.split(":")
    try:
        sys.exit(getattr(importlib.import_module(module), function)(arguments))
    finally:
        atexit._run_exitfuncs()  # a forked process leaves them out
