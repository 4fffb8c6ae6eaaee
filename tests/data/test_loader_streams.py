"""Several weighted folders, remote ones and their cache: what is refused. What they yield: see `test_data_ranks`."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from streaming import StreamingDataset
from tiny_data import make_image_processor, make_samples, make_tokenizer

from hive_ds.config import DataConfig
from hive_ds.data.loader import build_loader
from hive_ds.data.mds import SampleLoader, write_mds
from hive_ds.data.mds.streams import share_out
from hive_ds.errors import HiveError


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """streaming keeps lock files in the temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def make(weights: dict[str, float], num_workers: int = 0, **changes: object) -> SampleLoader:
    return build_loader(
        DataConfig(train=weights, num_workers=num_workers, **changes),  # type: ignore[arg-type]
        make_tokenizer("llama3"),
        make_image_processor(),
        micro_batch_size=4,
        global_batch_size=8,
        seed=1,
        train=True,
    )


@pytest.mark.usefixtures("forkserver_by_default")
def test_workers_are_forked_whatever_python_itself_would_do(tmp_path: Path) -> None:
    """They would import everything anew, and be children of the server, whose word they would wait for."""
    write_mds(make_samples(9), tmp_path / "data")
    before = multiprocessing.active_children()
    batches = iter(make({str(tmp_path / "data"): 1.0}, num_workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    assert Path(f"/proc/{worker.pid}/stat").read_text().split()[3] == str(os.getpid())


def test_position_in_another_mixture_or_order_is_refused_by_name(tmp_path: Path) -> None:
    write_mds(make_samples(9), tmp_path / "data")
    write_mds(make_samples(9), tmp_path / "other")
    folder, other = str(tmp_path / "data"), str(tmp_path / "other")
    state = make({folder: 1.0, other: 2.0}).state_dict()
    make({other: 2.0, folder: 1.0}).load_state_dict(json.loads(json.dumps(state)))
    with pytest.raises(HiveError, match=rf"saved with weights .*{other}': 2\.0.*run has .*{other}': 1\.0"):
        make({other: 1.0, folder: 1.0}).load_state_dict(state)
    in_order = make({folder: 1.0, other: 2.0}, shuffle=False)
    with pytest.raises(HiveError, match="saved with shuffle True, but the run has False"):
        in_order.load_state_dict(state)


def test_folder_that_no_epoch_reads_is_named(tmp_path: Path) -> None:
    for name in ("data", "other"):
        write_mds(make_samples(9), tmp_path / name)
    folder, other = str(tmp_path / "data"), str(tmp_path / "other")
    make({folder: 1.0, other: 0.05})
    with pytest.raises(HiveError, match=rf"{other} with weight 0\.005 of 1\.005 gets none of the 24 samples"):
        make({folder: 1.0, other: 0.005})


def test_cache_limit_that_cannot_work_is_named(tmp_path: Path) -> None:
    write_mds(make_samples(9), tmp_path / "data")
    folder = str(tmp_path / "data")
    with pytest.raises(HiveError, match=rf"data\.cache_limit 1gb: .*would delete shards of {folder}, which is local"):
        make({folder: 1.0}, cache_limit="1gb")
    remote = {f"file://{folder}": 1.0}
    with pytest.raises(HiveError, match=rf"data\.cache_limit 1gb: .*would delete shards of {folder}, which is local"):
        make({**remote, folder: 1.0}, cache=str(tmp_path / "cache"), cache_limit="1gb")
    with pytest.raises(HiveError, match=r"data\.cache_limit 5kb: Cache limit .* is too low"):
        make(remote, cache=str(tmp_path / "cache"), cache_limit="5kb")
    with pytest.raises(HiveError, match=r"data folder gopher://x: Unsupported remote path"):
        make({"gopher://x": 1.0}, cache=str(tmp_path / "cache"))


def test_remote_folders_of_one_name_are_kept_apart_in_the_cache(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_mds([replace(sample, id=f"{place}-{sample.id}") for sample in make_samples(8)], tmp_path / place / "data")
    weights = {f"file://{tmp_path / place / 'data'}": 1.0 for place in ("a", "b")}
    batches = make(weights, cache=str(tmp_path / "cache"))
    seen = {name for _, batch in zip(range(4), batches, strict=False) for name in batch.sample_ids}
    assert seen == {f"{place}-{sample.id}" for place in ("a", "b") for sample in make_samples(8)}


def test_one_folder_may_be_moved_between_two_runs(tmp_path: Path) -> None:
    write_mds(make_samples(9), tmp_path / "data")
    first = make({str(tmp_path / "data"): 1.0})
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    rest = next(batches).sample_ids
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = make({str(tmp_path / "moved"): 3.0})
    moved.load_state_dict(json.loads(json.dumps(state)))
    assert next(iter(moved)).sample_ids == rest


def test_remote_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    message = rf"^data folder file://{tmp_path}/none: the index cannot be read: .*index\.json"
    with pytest.raises(HiveError, match=message) as caught:
        make({f"file://{tmp_path}/none": 1.0}, cache=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_closed_loader_leaves_the_cache_to_another(tmp_path: Path) -> None:
    """Though it, and an iteration of it, are still there."""
    write_mds(make_samples(9), tmp_path / "data")
    weights, cache = {f"file://{tmp_path / 'data'}": 1.0}, str(tmp_path / "cache")
    first = make(weights, cache=cache)
    batches = iter(first)
    ids = next(batches).sample_ids
    with pytest.raises(HiveError, match=r"data\.cache: .* is in use by process"):
        make(weights, cache=cache)
    first.close()
    assert next(iter(make(weights, cache=cache))).sample_ids == ids


def test_a_cache_with_a_limit_is_asked_for_every_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shards may be gone by then; without a limit once is enough."""
    asked = []
    monkeypatch.setattr(StreamingDataset, "prepare_shard", lambda _, shard, blocking: asked.append((shard, blocking)))
    write_mds(make_samples(9), tmp_path / "data")
    for limit, times in ((None, 1), ("1gb", 3)):
        asked.clear()
        batches = make({f"file://{tmp_path / 'data'}": 1.0}, cache=str(tmp_path / f"{limit}"), cache_limit=limit)
        for _ in range(3):
            batches.dataset.prepare_shard(0, blocking=False)
        assert asked == [(0, False)] * times


SCRIPT = """
import sys
from test_loader_streams import make
batches = iter(make({sys.argv[1]: 1.0}))
next(batches)
"""


def test_a_script_that_ends_within_an_epoch_is_quiet(tmp_path: Path) -> None:
    write_mds(make_samples(24), tmp_path / "data")
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "data")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (32, [1, 3], [8, 24]),
        (10, [1.0], [10]),
        (10, [1, 1, 1], [4, 3, 3]),
        (5, [0.001, 1, 1e6], [0, 0, 5]),
        (7, [0.1, 0.2, 0.7], [1, 1, 5]),
    ],
)
def test_shares_are_whole_and_sum_to_the_epoch(total: int, weights: list[float], parts: list[int]) -> None:
    assert share_out(total, weights) == parts
