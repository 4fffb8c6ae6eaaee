"""Shards and the loader of one rank: round trip, wrong input, bad samples, workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from streaming import StreamingDataset
from tiny_data import flat, make_image_processor, make_samples, make_tokenizer

from hive_ds.config import DataConfig
from hive_ds.data import loader as loader_module
from hive_ds.data.environment import World, find_world
from hive_ds.data.images import decode_image, process_images
from hive_ds.data.loader import build_loader
from hive_ds.data.mds import SampleLoader, write_mds
from hive_ds.data.preprocess import make_preprocessor
from hive_ds.data.schema import from_columns
from hive_ds.data.text import encode_sample, prepare_tokenizer
from hive_ds.errors import HiveError

NUMBER = 23


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """streaming keeps lock files in the temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shards") / "train"
    write_mds(make_samples(NUMBER), path)
    return str(path)


def loader(
    folder: str,
    *,
    train: bool = False,
    micro: int = 4,
    seed: int = 1,
    train_folders: dict[str, float] | None = None,
    **changes: object,
) -> SampleLoader:
    data = DataConfig(
        train=train_folders or folder, validation=folder, num_workers=0, max_bad_share=0.0, max_length=512
    )
    return build_loader(
        replace(data, **changes),
        make_tokenizer("llama3"),
        make_image_processor(),
        micro_batch_size=micro,
        global_batch_size=8,
        seed=seed,
        train=train,
    )


@pytest.mark.parametrize(("place", "times"), [("file://", 1), ("", 0)], ids=["remote", "local"])
def test_looking_ahead_asks_once_for_a_shard(
    place: str, times: int, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And not once for a sample, and not at all of a local folder; a sample whose shard is missing asks every time."""
    asked = []
    ask = StreamingDataset.prepare_shard

    def prepare_shard(dataset: StreamingDataset, shard: int, blocking: bool = True) -> None:
        asked.append((shard, blocking))
        ask(dataset, shard, blocking)

    monkeypatch.setattr(StreamingDataset, "prepare_shard", prepare_shard)
    batches = loader(place + folder, cache=str(tmp_path))
    assert sum(batch.num_samples for batch in batches) >= NUMBER
    assert asked.count((0, False)) == len(asked) == times
    for _ in range(2 * times):
        batches.dataset.prepare_shard(0)
    assert asked.count((0, True)) == 2 * times


def test_batches_hold_what_was_written(folder: str) -> None:
    samples = {sample.id: sample for sample in make_samples(NUMBER)}
    tokenizer, processor = prepare_tokenizer(make_tokenizer("llama3")), make_image_processor()
    seen = []
    for batch in loader(folder):
        tokens, pixels = [], []
        for name in batch.sample_ids:
            text = encode_sample(samples[name], tokenizer, template="plain", image_position="first", max_length=512)
            tokens += text.input_ids
            pixels += [decode_image(image) for image in samples[name].images]
        assert batch.input_ids.tolist() == tokens
        expected = process_images(pixels, processor)["pixel_values"]
        assert batch.images["pixel_values"].dtype == torch.uint8  # a quarter of the bytes on the way to the device
        found = batch.model_inputs("cpu", torch.float32)["pixel_values"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        seen += batch.sample_ids
    assert len(seen) == 24
    assert set(seen) == set(samples)


# A step's 8 images are fetched at once, and each worker makes one batch more, as far as /dev/shm has room for images.
@pytest.mark.parametrize(
    ("workers", "micro", "room", "expected"),
    [(0, 1, 99, None), (2, 1, 99, 5), (2, 4, 99, 2), (2, 1, 5, 3), (2, 4, 6, 1)],
)
def test_workers_make_a_step_ahead(
    folder: str, monkeypatch: pytest.MonkeyPatch, workers: int, micro: int, room: int, expected: int | None
) -> None:
    image = make_preprocessor(make_image_processor()).dummy()["pixel_values"]
    monkeypatch.setattr(loader_module, "SHM_PER_RANK", float(room * image.nbytes))
    batches = loader(folder, train=True, micro=micro, num_workers=workers)
    assert batches.prefetch_factor == expected


def test_validation_is_the_same_pass_every_time(folder: str) -> None:
    passes = loader(folder)
    assert len(passes) == 6
    first = [batch.sample_ids for batch in passes]
    next(iter(passes))  # a pass that is given up
    assert [batch.sample_ids for batch in passes] == first
    in_order = flat([sorted(ids) for ids in first[:-1]])  # within a batch, samples stand by length
    assert in_order == [sample.id for sample in make_samples(NUMBER)][: len(in_order)]
    assert set(flat(first)) == {sample.id for sample in make_samples(NUMBER)}


def test_training_goes_on_where_it_was_left(folder: str) -> None:
    straight = iter(loader(folder, train=True))
    expected = [next(straight).sample_ids for _ in range(15)]
    stopped = loader(folder, train=True)
    seen = []
    for stop in (2, 4, 9):  # within an epoch, at its end (6), in the next one
        for batch in stopped:
            seen.append(batch.sample_ids)
            if len(seen) in (2, 6, 15):
                break
        assert stopped.state_dict()["samples"] == {2: 8, 4: 0, 9: 12}[stop]
    assert seen == expected
    other = iter(loader(folder, train=True, seed=2))
    assert [next(other).sample_ids for _ in range(6)] != expected[:6]


def test_earlier_position_can_be_restored_in_the_same_process(folder: str) -> None:
    one = loader(folder, train=True)
    start = one.state_dict()
    batches = iter(one)
    seen = [next(batches).sample_ids for _ in range(8)]
    one.load_state_dict(start)
    again = iter(one)
    assert [next(again).sample_ids for _ in range(8)] == seen


@pytest.mark.parametrize("change", ["global_batch_size", "seed", "num_samples"])
def test_position_of_another_run_is_refused(folder: str, change: str) -> None:
    one = loader(folder, train=True)
    state = one.state_dict()
    with pytest.raises(HiveError, match=f"saved with {change} {state[change] + 1}, but the run has {state[change]}"):
        one.load_state_dict({**state, change: state[change] + 1})


def test_bad_samples_are_replaced_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However many of one rank's first samples they are: who knows those of all ranks says whether to go on."""
    write_mds(make_samples(NUMBER, bad=(5, 6)), tmp_path / "bad")
    batches = list(loader(str(tmp_path / "bad"), max_bad_share=0.01))
    seen = flat(batch.sample_ids for batch in batches)
    assert len(seen) == 24
    assert {"s005", "s006"}.isdisjoint(seen)
    assert seen.count("s007") >= 3
    assert {bad.id for batch in batches for bad in batch.bad} == {"s005", "s006"}
    assert any("s006 replaced: image of 12 bytes cannot be read" in record.message for record in caplog.records)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_ends_the_run_in_one_line(tmp_path: Path, workers: int) -> None:
    write_mds([sample for sample in make_samples(9, bad=(0, 1, 2, 5, 6, 7)) if sample.images][:3], tmp_path / "bad")
    with pytest.raises(HiveError, match=r"^3 samples in a row cannot be used; the last, s00") as caught:
        list(loader(str(tmp_path / "bad"), num_workers=workers, max_bad_share=1.0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no index.json; expected MDS shards"),
        (lambda path: (path.mkdir(), (path / "index.json").write_text("{")), "cannot be read"),
        (lambda path: (path.mkdir(), (path / "index.json").write_text('{"shards": [], "version": 2}')), "no samples"),
    ],
    ids=["missing", "no index", "broken index", "empty"],
)
def test_folder_without_samples_is_one_clear_error(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "data")  # type: ignore[operator]
    with pytest.raises(HiveError, match=rf"data folder {tmp_path}/data: .*{message}"):
        loader(str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro": 3}, "multiple of micro_batch_size 3 x 1 ranks"),
        ({"template": "plane"}, "data.template 'plane'"),
        ({"image_position": "last"}, "data.image_position 'last'"),
        ({"validation": None}, "data.validation is not set"),
        ({"validation": "s3://bucket/data"}, "expected data.cache"),
    ],
)
def test_wrong_settings_are_named(folder: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(HiveError, match=message):
        loader(folder, **changes)


def test_output_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> object:
        yield from make_samples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mds(broken(), tmp_path / "out")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HiveError, match="no sample to write"):
        write_mds([], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert write_mds(make_samples(3), tmp_path / "out") == 3
    with pytest.raises(HiveError, match="not an empty folder"):
        write_mds(make_samples(3), tmp_path / "out")


def test_image_sizes_that_do_not_fit_are_named() -> None:
    columns = {"id": "s1", "turns": [], "images": b"abc", "image_sizes": [2], "meta": {}}
    with pytest.raises(HiveError, match="'s1': image_sizes sum to 2 bytes, but there are 3"):
        from_columns(columns)
    with pytest.raises(HiveError, match="without column 'image_sizes'"):
        from_columns({name: value for name, value in columns.items() if name != "image_sizes"})


def test_deepspeed_launcher_environment_is_completed_for_streaming() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
    assert find_world(environ) == World(3, 4, 2)
    assert environ["LOCAL_WORLD_SIZE"] == "2"
    alone: dict[str, str] = {}
    assert find_world(alone) == World(0, 1, 1)
    assert alone == {}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "without LOCAL_WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, "RANK=2"),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_SIZE": "2"}, "machines of equal size"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, "expected one value"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, "RANK='x'"),
    ],
)
def test_contradicting_launcher_environment_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(HiveError, match=message):
        find_world(environ)


WORKERS = """
import json, multiprocessing, os, signal, sys, time
from test_data_mds import loader
batches = iter(loader(sys.argv[1], train=True, num_workers=2))
seen = [next(batches).sample_ids]
workers = multiprocessing.active_children()
for worker in workers:  # from another process, as the launcher would
    os.system(f"kill -TERM {worker.pid}; kill -INT {worker.pid}")
time.sleep(0.3)
alive = [worker.is_alive() for worker in workers]
seen += [next(batches).sample_ids for _ in range(13)]
print(json.dumps({"seen": seen, "alive": alive, "end": time.time()}), flush=True)
sys.exit(3)
"""


def test_workers_outlive_a_signal_and_end_with_their_process(folder: str, tmp_path: Path) -> None:
    """The launcher's SIGTERM reaches workers too; and a run that ends in the middle of an epoch must not hang."""
    command = [sys.executable, "-c", WORKERS, folder]
    environ = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}",
    }
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    took = time.time() - json.loads(done.stdout)["end"]
    assert done.returncode == 3, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["alive"] == [True, True]
    straight = iter(loader(folder, train=True))
    assert result["seen"] == [next(straight).sample_ids for _ in range(14)]
    assert took < 20
    assert done.stderr == ""  # no warning of the tokenizers at the fork, no trace of a worker


BLOCKED = """
import sys
sys.modules["streaming"] = None
import hive_ds.data, hive_ds.data.loader, hive_ds.data.convert, hive_ds.data.sources, hive_ds.processing
from hive_ds.errors import HiveError
try:
    import hive_ds.data.mds
except HiveError as error:
    print(error)
"""


def test_everything_but_shards_works_without_streaming() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pip install 'hive-ds[streaming]'" in done.stdout
