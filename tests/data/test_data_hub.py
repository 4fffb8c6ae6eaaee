"""What is asked for at the Hugging Face hub, and what is said where that fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hive_ds.data.sources import SourceOptions, open_source
from hive_ds.data.sources.hugging_face import load_splits
from hive_ds.errors import HiveError


@pytest.mark.parametrize("name", ["here/nothing", "nowhere/data.parquet", "nowhere/data.json"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(HiveError, match=f"{name}: (no such file or folder|does not exist)"):
        open_source(SourceOptions(name))
    if not name.endswith(".json"):
        with pytest.raises(HiveError, match=f"dataset {name}: no such file or folder"):
            load_splits(name)


def test_a_hub_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")

    def fail(name: str) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("MaxRetryError, five lines of it")
        raise ConnectionError(f"no way to {name}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    expected = r"dataset some/name: neither a file or folder here nor reachable on the hub \(.*no way to some/name\)$"
    with pytest.raises(HiveError, match=expected):
        open_source(SourceOptions("some/name"))
    assert "MaxRetryError" not in caplog.text
