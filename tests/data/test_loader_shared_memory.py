"""Runs on one machine at once, killed ones among them: nobody disturbs another, and nothing is left behind."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from tiny_data import make_samples
from torch.utils.data import DataLoader

from hive_ds.data.batch import PreparedSample
from hive_ds.data.mds import SampleDataset, write_mds
from hive_ds.data.mds.shared_memory import BLOCKS, _turn
from hive_ds.errors import HiveError

RUN = """
import os, sys, time
from test_loader_shared_memory import dataset, loader
batches = loader(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
print(dataset(batches)._shm_prefix_int, flush=True)
for number, names in enumerate(batches):
    print(" ".join(names), flush=True)
    if number == 2 and sys.argv[4] == "wait":
        sys.stdin.readline()
"""


def make_dataset(folder: str, cache: str | None = None, *, balance: bool = False) -> SampleDataset:
    return SampleDataset(
        {folder: 1.0},
        cache=cache,
        cache_limit=None,
        prepare=lambda sample: PreparedSample(sample.id, None, {}),  # type: ignore[arg-type]
        micro_batch_size=2,
        global_batch_size=2,
        shuffle=True,
        seed=3,
        balance=balance,
    )


def names(samples: list[PreparedSample]) -> list[str]:
    return [sample.id for sample in samples]


def loader(folder: str, cache: str, workers: int) -> DataLoader:
    data = make_dataset(folder, cache)
    forked = "fork" if workers else None
    return DataLoader(data, batch_size=2, num_workers=workers, collate_fn=names, multiprocessing_context=forked)


def dataset(batches: DataLoader) -> SampleDataset:
    assert isinstance(batches.dataset, SampleDataset)
    return batches.dataset


def start(folder: str, cache: Path, workers: int, how: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}
    command = [sys.executable, "-c", RUN, folder, str(cache), str(workers), how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environ, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]


def left_of(prefix: str) -> list[str]:
    folders = (BLOCKS, Path(tempfile.gettempdir()))
    return [path.name for folder in folders for path in folder.iterdir() if prefix in path.name]


def test_killed_run_leaves_nothing_and_a_live_one_goes_on(tmp_path: Path) -> None:
    """The killed run and the next one download to the same cache, where stale memory would stop the next."""
    write_mds(make_samples(24), tmp_path / "data")
    folder, remote, cache = str(tmp_path / "data"), f"file://{tmp_path / 'data'}", tmp_path / "cache"
    live, killed = start(folder, cache, 0, "wait"), start(remote, cache, 2, "wait")
    third = None
    try:
        prefixes = {run: run.stdout.readline().strip() for run in (live, killed)}  # type: ignore[union-attr]
        said = {run: [run.stdout.readline() for _ in range(3)] for run in (live, killed)}  # type: ignore[union-attr]
        os.killpg(killed.pid, signal.SIGKILL)  # workers and multiprocessing's resource tracker, too
        killed.wait()
        assert len(left_of(prefixes[killed])) > 5
        third = start(remote, cache, 0, "straight")
        third_prefix, *rest = third.communicate(timeout=100)[0].splitlines(keepends=True)
        assert third.returncode == 0
        assert len(rest) == 12
        assert len({name for line in rest for name in line.split()}) == 24
        assert left_of(prefixes[killed]) == left_of(third_prefix.strip()) == []
        assert len(left_of(prefixes[live])) > 5
        said[live] += live.communicate("\n", timeout=100)[0].splitlines(keepends=True)
        assert live.returncode == 0
        assert said[live] == rest
        assert left_of(prefixes[live]) == []
    finally:
        for run in (live, killed, third):
            if run is not None and run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def construct(folder: str, ready: object, out: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    prefixes = [make_dataset(folder)._shm_prefix_int for _ in range(10)]
    out.put(prefixes)  # type: ignore[attr-defined]


def test_runs_that_start_at_the_same_moment_do_not_collide(tmp_path: Path) -> None:
    write_mds(make_samples(4), tmp_path / "data")
    context = multiprocessing.get_context("fork")
    ready, out = context.Barrier(4), context.Queue()
    processes = [context.Process(target=construct, args=(str(tmp_path / "data"), ready, out)) for _ in range(4)]
    for process in processes:
        process.start()
    prefixes = [prefix for _ in processes for prefix in out.get(timeout=60)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(set(prefixes)) == 40


def construct_for_ever(folder: str, ready: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    while True:
        make_dataset(folder)


def test_runs_killed_while_they_start_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_mds(make_samples(4), tmp_path / "data")
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(9)
    arguments = (str(tmp_path / "data"), ready)
    processes = [context.Process(target=construct_for_ever, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    ready.wait()
    for process in processes:
        time.sleep(random.Random(process.pid).uniform(0.02, 0.1))
        process.kill()
        process.join()
    ours = str(make_dataset(str(tmp_path / "data"))._shm_prefix_int)
    records = [path for path in BLOCKS.glob("hive_ds-*.json") if str(tmp_path) in path.read_text()]
    assert [path.stem.rpartition("-")[2] for path in records] == [ours]
    known = {path.stem.rpartition("-")[2] for path in BLOCKS.glob("hive_ds-*.json")}
    blocks = {path.name.split("_")[0] for path in BLOCKS.iterdir() if re.match(r"\d{10}_", path.name)}
    assert ours in blocks <= known
    assert all(ours in path.name for path in tmp_path.glob("*_filelock"))


def test_cache_of_a_live_run_is_refused(tmp_path: Path) -> None:
    write_mds(make_samples(4), tmp_path / "data")
    one = make_dataset(f"file://{tmp_path / 'data'}", str(tmp_path / "cache"))
    with pytest.raises(HiveError, match=rf"data\.cache: {tmp_path}/cache.* is in use by process {os.getpid()};"):
        make_dataset(f"file://{tmp_path / 'data'}", str(tmp_path / "cache"))
    assert json.loads(next(BLOCKS.glob(f"*-{one._shm_prefix_int}.json")).read_bytes())["process"] == os.getpid()
    del one
    gc.collect()
    make_dataset(f"file://{tmp_path / 'data'}", str(tmp_path / "cache"))


@pytest.mark.timeout(30)
def test_dropped_data_set_may_be_collected_while_this_process_has_the_turn(tmp_path: Path) -> None:
    write_mds(make_samples(4), tmp_path / "data")
    one = make_dataset(f"file://{tmp_path / 'data'}", str(tmp_path / "cache"))
    record = next(BLOCKS.glob(f"*-{one._shm_prefix_int}.json"))
    with _turn():  # as while it starts on another data set, when the garbage collector may come at any moment
        del one
        gc.collect()
    assert json.loads(record.read_bytes())["caches"] == []
