"""Members of a tar that belong to one sample; images in a zip."""

from __future__ import annotations

import json
import tarfile
import zipfile
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


def test_two_files_of_one_suffix_are_not_lost_unsaid(tmp_path: Path) -> None:
    """As in a tar that was made of two: neither is passed over for the other, and samples beside them are read."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("a.jpg", FILES["0.jpg"]), ("a.txt", b"One."), ("b.jpg", FILES["1.jpg"]), ("b.txt", b"B.")]:
            add(tar, name, data)
        add(tar, "a.JPG", FILES["2.jpg"])
    source = open_source(SourceOptions(str(tmp_path)))
    message = (
        r"a\.tar, key a: holds a\.jpg at byte 512 and a\.JPG at byte \d{4}; expected one file of a key and suffix$"
    )
    for read in (source.read, source.images):
        with pytest.raises(HiveError, match=message):
            read(0)
    assert source.read(1).images == (FILES["1.jpg"],)


def test_a_damaged_zip_loses_one_image_and_no_run(tmp_path: Path) -> None:
    """`recaption` goes on past a `HiveError` alone."""
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("0.jpg", "1.jpg"):
            file.writestr(name, FILES[name])
        start = file.getinfo("1.jpg").header_offset + 30 + len("1.jpg")
    data = path.read_bytes()
    path.write_bytes(data[:start] + bytes(40) + data[start + 40 :])
    rows = [{"image": f"./{number}.jpg", "caption": "A cat."} for number in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = open_source(SourceOptions(str(tmp_path / "a.json"), images=str(path)))
    assert source.images(0) == (FILES["0.jpg"],)
    with pytest.raises(HiveError, match=r"image \./1\.jpg: cannot be read from images\.zip \(Error -3"):
        source.images(1)
