"""What separates the fields of a table."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus import encoded, photo

from hive_ds.data.sources import SourceOptions, open_source
from hive_ds.errors import HiveError

IMAGE = encoded(photo(seed=0), "png")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("separator", ",\t")
@pytest.mark.parametrize("header", ["image{0}caption\n", ""])
def test_commas_or_tabs_are_told_by_the_first_line(tmp_path: Path, name: str, separator: str, header: str) -> None:
    (tmp_path / "0.png").write_bytes(IMAGE)
    caption = "A cat, seen" if separator == "\t" else "A cat"
    (tmp_path / name).write_text((header + "0.png{0}" + caption + "\n").format(separator))
    source = open_source(SourceOptions(str(tmp_path / name)))
    assert len(source) == 1
    sample = source.read(0)
    assert (sample.images, sample.turns[1].content) == ((IMAGE,), caption)


def test_a_table_of_neither_commas_nor_tabs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image;caption\n0.png;A cat\n")
    with pytest.raises(HiveError, match=r"a\.csv: line 'image;caption' has one field; expected commas or tabs between"):
        open_source(SourceOptions(str(tmp_path / "a.csv")))
