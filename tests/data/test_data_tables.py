"""What separates the fields of a table, and the byte order mark that some programs begin a file with."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("name", ["0.txt", "metadata.csv", "metadata.jsonl", "a.csv", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    """Nor is a long caption refused in one kind of table alone."""
    caption = "A cat. " * 30_000
    lines = {
        ".txt": caption,
        ".csv": f"file_name,text\n0.png,{caption}\n",
        ".jsonl": json.dumps({"file_name": "0.png", "text": caption}),
    }
    (tmp_path / "0.png").write_bytes(IMAGE)
    (tmp_path / name).write_text(lines[Path(name).suffix], encoding="utf-8-sig")
    path = tmp_path / name if name.startswith("a.") else tmp_path
    options = SourceOptions(str(path), images=str(tmp_path) if path.is_file() else None)
    sample = open_source(options).read(0)
    assert (sample.images, sample.turns[1].content) == ((IMAGE,), caption.strip())


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "metadata.csv"])
@pytest.mark.parametrize("after", ["", '{0}A "good" dog', '{0}"A dog"'])
def test_a_loose_quotation_mark_swallows_no_rows(tmp_path: Path, name: str, after: str) -> None:
    """Python's reader takes all up to the next mark for one caption, and the rows between are gone."""
    separator = "\t" if name == "a.tsv" else ","
    lines = ["file_name{0}text", '0.png{0}"Best cat', "1.png{0}A cat", "2.png" + (after or "{0}A dog")]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(IMAGE)
    (tmp_path / name).write_text("\n".join(lines).format(separator) + "\n")
    with pytest.raises(HiveError, match=rf"{name}: the row that begins in line 2 cannot be read"):
        open_source(SourceOptions(str(tmp_path if name == "metadata.csv" else tmp_path / name)))
