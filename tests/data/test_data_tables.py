"""What separates the fields of a table, and the byte order mark that some programs begin a file with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from corpus import encoded, photo

from hive_ds.data.sources import Columns, SourceOptions, open_source
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


def test_a_tab_in_a_caption_separates_nothing(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(IMAGE)
    (tmp_path / "a.csv").write_text("0.png,A cat\tseen\n")
    assert open_source(SourceOptions(str(tmp_path / "a.csv"))).read(0).turns[1].content == "A cat\tseen"


def test_a_table_of_neither_commas_nor_tabs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image;caption\n0.png;A cat\n")
    with pytest.raises(HiveError, match=r"a\.csv: line 'image;caption' has one field; expected commas or tabs between"):
        open_source(SourceOptions(str(tmp_path / "a.csv")))


def test_a_table_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption,caption\n0.png,A cat,A dog\n")
    with pytest.raises(HiveError, match=r"a\.csv: names column 'caption' more than once; expected each once"):
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


def test_columns_of_any_name_are_taken_where_they_are_named(tmp_path: Path) -> None:
    """The first line is a header then; ids are a column's, or else the paths of the images."""
    (tmp_path / "0.png").write_bytes(IMAGE)
    (tmp_path / "a.csv").write_text("nr,foto,worte\n7,0.png,A cat.\n,0.png,A dog.\n")
    named = Columns(image="foto", text="worte")
    for columns, ids in ((replace(named, id="nr"), ["7", "0.png"]), (named, ["0.png", "0.png"])):
        source = open_source(SourceOptions(str(tmp_path / "a.csv"), columns=columns))
        samples = [source.read(at) for at in range(len(source))]
        assert [sample.id for sample in samples] == [source.sample_id(at) for at in range(2)] == ids
        assert [sample.turns[1].content for sample in samples] == ["A cat.", "A dog."]


def test_a_row_of_more_or_fewer_fields_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(IMAGE)
    (tmp_path / "a.csv").write_text("image,caption\n0.png,A cat, a dog\n\n0.png\n0.png,A cat\n")
    source = open_source(SourceOptions(str(tmp_path / "a.csv")))
    for at, fields in enumerate((3, 1)):
        with pytest.raises(HiveError, match=rf"^has {fields} fields; expected 2: image, caption$"):
            source.read(at)
    assert source.read(2).turns[1].content == "A cat"


def test_the_line_of_a_row_that_cannot_be_read_counts_lines_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('image,caption\n0.png,"A\ncat"\n1.png,"A\n\ndog" x\n')
    with pytest.raises(HiveError, match=r"the row that begins in line 4 cannot be read"):
        open_source(SourceOptions(str(tmp_path / "a.csv")))


def test_images_of_a_table_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(IMAGE)
    (tmp_path / "a.csv").write_text("image,caption\n0.png,A cat\n")
    given = SourceOptions(str(tmp_path / "a.csv"))
    assert open_source(replace(given, images=str(tmp_path / "photos"))).images(0) == (IMAGE,)
    with pytest.raises(HiveError, match=r"image 0\.png: No such file"):
        open_source(given).images(0)
