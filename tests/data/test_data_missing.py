"""A local folder of shards that lost one, or bytes of one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from shard_folders import write_samples
from test_data_mds import NUMBER, folder, loader, own_temporary_folder  # noqa: F401 (fixtures)
from tiny_data import make_samples

from hive_ds.data.mds import write_mds
from hive_ds.errors import HiveError


def test_a_missing_shard_is_named(folder: str, tmp_path: Path) -> None:  # noqa: F811
    """Before the first sample, and by the first sample that needs it."""
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    batches = loader(str(copy))
    (copy / "shard.00000.mds").unlink()
    for use in (lambda: next(iter(batches)), lambda: loader(str(copy))):
        with pytest.raises(HiveError, match=f"data folder {copy}: index.json lists shard.00000.mds, which is missing"):
            use()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["remote", "compressed, missing", "compressed, damaged"])
@pytest.mark.filterwarnings("ignore:StreamingDataLoader|.*process.*fork:")
def test_a_shard_that_cannot_be_had_ends_the_run_and_no_epoch(kind: str, workers: int, tmp_path: Path) -> None:
    """streaming would end a worker's epoch there, and go on with the next one."""
    data, options = tmp_path / "data", {} if kind == "remote" else {"compression": "zstd"}
    write_samples(data, make_samples(80), **options)
    shard = sorted(data.rglob("*.mds*"))[12]
    prefix = "file://" if kind == "remote" else ""
    batches = loader(
        f"{prefix}{data}", train=True, num_workers=workers, shuffle=False, cache=str(tmp_path / "cache")
    )  # looked at when it opens
    shard.write_bytes(b"") if "damaged" in kind else shard.unlink()
    name = shard.relative_to(data).as_posix()
    code, message = {
        "remote": (1, f"^data folder file://{data}: {name} cannot be brought to .*FileNotFoundError: .*$"),
        "compressed, missing": (2, f"^data folder {data}: index.json lists {name[:-5]}, which is missing$"),
        "compressed, damaged": (2, f"^data folder {data}: {name} cannot be decompressed .Error: .*header.*$"),
    }[kind]
    seen = []
    with pytest.raises(HiveError, match=message) as caught:
        seen.extend((batches.state_dict()["epoch"], batch.num_samples) for batch in batches)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert {epoch for epoch, _ in seen} == {0}
    assert 16 <= sum(samples for _, samples in seen) < 80
    if kind == "compressed, missing":
        with pytest.raises(HiveError, match=message):
            loader(str(data))


@pytest.mark.parametrize(
    ("damaged", "place", "reason"),
    [
        (b"s\xff10", b"s010", "number 10: 'utf-8' codec"),
        (b'"contemt"', b'"content"', "number 0: .*KeyError: 'content'"),
        (b"\xff" * 4, 4 * 11, "number 10: .*not present in the shard.00000.mds"),
    ],
    ids=["text", "key", "where a sample begins"],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_damaged_bytes_are_a_bad_sample(damaged: bytes, place: bytes | int, reason: str, tmp_path: Path) -> None:
    write_mds(make_samples(NUMBER), tmp_path / "data")
    shard = tmp_path / "data" / "shard.00000.mds"
    data = shard.read_bytes()
    at = data.index(place) if isinstance(place, bytes) else place
    shard.write_bytes(data[:at] + damaged + data[at + len(damaged) :])
    batches = list(loader(str(tmp_path / "data"), max_bad_share=1.0))
    assert sum(batch.num_samples for batch in batches) == 24
    found = {f"{bad.id}: {bad.reason}" for batch in batches for bad in batch.bad}
    assert len(found) == 1
    assert re.match(reason, found.pop())
