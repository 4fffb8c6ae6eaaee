"""What is asked for at the Hugging Face hub, and what is said where that fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hive_ds.data.convert import convert
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


def test_a_conversion_does_not_go_on_with_another_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps a dataset of the hub in a folder that is called as the commit."""
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'hive-ds[datasets]'")

    def at(commit: str) -> None:
        file = tmp_path / commit / "name-train.arrow"
        file.parent.mkdir()
        with ArrowWriter(path=str(file)) as writer:
            writer.write({"image": b"no picture", "text": "one"})
            writer.finalize()
        monkeypatch.setattr(datasets, "load_dataset", lambda _: datasets.Dataset.from_file(str(file)))

    from datasets.arrow_writer import ArrowWriter

    at("aaa")
    for _ in range(2):
        with pytest.raises(HiveError, match="1 of 1 samples were rejected"):
            convert(open_source(SourceOptions("some/name")), tmp_path / "out")
    at("bbb")
    with pytest.raises(HiveError, match="begun there with source revision 'aaa', not 'bbb'"):
        convert(open_source(SourceOptions("some/name")), tmp_path / "out")
