"""A local folder of shards that lost one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_data_mds import folder, loader  # noqa: F401 (a fixture)

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
