"""Run a list of checks on several ranks in one launch, and tell pytest about each.

A launch costs some seconds, so checks that need ranks are functions ``check_*(ranks)`` in a file of their own: one
launch runs them all in order on every rank and writes a verdict per check. What a check returns on rank 0 comes back
too, so that launches with other numbers of ranks can be compared.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from forked import Ended, run_forked

HERE = Path(__file__).parent
PYTHONPATH = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent, HERE.parent / "data"))


@dataclass(frozen=True)
class Verdict:
    """How one check went."""

    errors: list[str]
    """Stack traces, of any rank."""
    value: Any
    """What rank 0 returned."""


def check_names(*modules: str) -> list[str]:
    """``module.check`` of every check in these modules, in order, without importing them."""
    return [
        f"{module}.{line[4 : line.index('(')]}"
        for module in modules
        for line in (HERE / f"{module}.py").read_text().splitlines()
        if line.startswith("def check_")
    ]


def launch_checks(
    names: list[str], num_ranks: int, folder: Path, run: Callable[..., Ended] = run_forked
) -> dict[str, Verdict]:
    """Run these checks on ``num_ranks`` ranks, in one launch, and return a verdict for each."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "TMPDIR": tempfile.mkdtemp(dir=folder)}
    done = run("ranks:main", [str(folder), *names], env, num_ranks, timeout=800)
    verdicts: dict[str, Verdict] = {}
    broken = None
    for name in names:
        if broken is not None:
            verdicts[name] = Verdict([f"did not run: {broken} failed before it, in the same launch"], None)
            continue
        files = [folder / f"{name}.{rank}.json" for rank in range(num_ranks)]
        if not all(path.exists() for path in files):
            verdicts[name] = Verdict(
                [f"did not run; the launch ended with\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"], None
            )
            broken = name
            continue
        reports = [json.loads(path.read_text()) for path in files]
        verdicts[name] = Verdict([r["error"] for r in reports if r["error"]], reports[0]["value"])
        broken = name if verdicts[name].errors else None
    return verdicts


def passed(verdict: Verdict) -> Any:
    """Fail the test that calls this where the check failed; else return what rank 0 returned."""
    if verdict.errors:
        pytest.fail("\n".join(verdict.errors), pytrace=False)
    return verdict.value


@dataclass(frozen=True)
class Ranks:
    """What a check is given."""

    world: Any
    device: Any
    folder: Path
    frozen: int
    """Objects that collections left out when the ranks had met."""


def main(arguments: list[str]) -> int:
    """What each rank runs: the checks ``arguments[1:]``, whose reports go to the folder ``arguments[0]``."""
    import torch

    from hive_ds.training.distributed import all_values, read_world, start, stop

    folder, *names = arguments
    checks = [getattr(importlib.import_module(module), check) for module, check in (name.split(".") for name in names)]
    world = read_world(os.environ)
    timeout = timedelta(seconds=60)  # ranks out of step end the launch, not the tests' patience
    ranks = Ranks(world, start(world, timeout), Path(folder), gc.get_freeze_count())
    torch.set_printoptions(threshold=0, edgeitems=1)  # the start of ZeRO-3 prints all weights, to nobody
    for name, check in zip(names, checks, strict=True):
        error, value = None, None
        gc.freeze()  # what checks before left behind: DeepSpeed collects in every start, and would look through it
        try:
            value = check(ranks)
        except Exception:
            error = f"rank {world.rank}: {traceback.format_exc()}"
        report = json.dumps({"error": error, "value": value})
        (Path(folder) / f"{name}.{world.rank}.json").write_text(report)
        if any(all_values(error is not None)):  # ranks may be out of step now
            os._exit(1)
    stop()
    return 0
