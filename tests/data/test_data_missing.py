"""A local folder of shards that lost one, or bytes of one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
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
