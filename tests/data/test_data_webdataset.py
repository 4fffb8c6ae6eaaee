"""Members of a tar that belong to one sample."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from test_data_sources import FILES, add

from hive_ds.data.sources import SourceOptions, open_source
from hive_ds.errors import HiveError


def test_images_of_two_suffixes_are_not_lost_unsaid(tmp_path: Path) -> None:
    """Nor is a mask taken for the image that it lies beside."""
    names = {"a.0.jpg": "0.jpg", "a.1.jpg": "1.jpg", "b.jpg": "2.jpg", "b.mask.jpg": "3.jpg"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, file in names.items():
            add(tar, name, FILES[file])
        for name in ("a.txt", "b.txt"):
            add(tar, name, b"A cat.")
    source = open_source(SourceOptions(str(tmp_path)))
    with pytest.raises(HiveError, match=r"has images called 0\.jpg, 1\.jpg alone; expected a name of one suffix"):
        source.read(0)
    assert source.read(1).images == (FILES["2.jpg"],)
