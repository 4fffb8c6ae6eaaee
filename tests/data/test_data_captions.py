"""Captions of a file in place of a source's texts: each goes to the pictures that it is of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from corpus import PICTURES_ALONE, encoded, make_source, photo

from hive_ds.cli import main
from hive_ds.data.convert import convert
from hive_ds.data.convert_options import ConvertOptions, read_captions
from hive_ds.data.sources import SourceOptions, open_source
from hive_ds.data.sources.llava import LlavaSource
from hive_ds.errors import HiveError

pytest.importorskip("streaming", reason="needs mosaicml-streaming: pip install 'hive-ds[streaming]'")
from hive_ds.data.mds import read_mds

ANY_REJECTS = ConvertOptions(workers=1, max_reject_share=1.0)


def test_captions_from_a_file_replace_the_texts(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"id": str(n), "caption": f"New {n}."}) + "\n" for n in range(50)))
    convert(source, tmp_path / "out", replace(ANY_REJECTS, captions=captions))
    assert {s.id: s.turns[1].content for s in read_mds(tmp_path / "out")} == {
        str(n): f"New {n}." for n in range(50) if n != 7
    }
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {r["id"] for r in rejects if "captions has none" in r["reason"]} == {str(n) for n in range(50, 60)}
    captions.write_text('{"id": "1"}\n')
    with pytest.raises(HiveError, match=r"captions.jsonl, line 1: expected \{'id', 'caption'\} \(KeyError"):
        convert(source, tmp_path / "out2", replace(ANY_REJECTS, captions=captions))


def test_other_captions_do_not_go_on_with_what_was_begun(tmp_path: Path) -> None:
    """Of the same file, written anew."""
    source, captions = make_source(tmp_path), tmp_path / "captions.jsonl"
    options = replace(ANY_REJECTS, captions=captions, max_reject_share=0.0, part_size=4)
    rows = [{"id": str(n), "caption": "Old."} for n in range(60)]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(HiveError, match=r"1 of 60 samples were rejected"):
        convert(source, tmp_path / "out", options)
    captions.write_text("".join(json.dumps({**row, "caption": "New."}) + "\n" for row in rows))
    with pytest.raises(HiveError, match=r"begun there with captions '\w{64}', not '\w{64}'; give the same options"):
        convert(source, tmp_path / "out", options)


@pytest.mark.parametrize("kind", ["folder", "table", "llava", "webdataset", "parquet"])
def test_captions_from_a_file_need_no_other_text(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "source"
    path, ids = PICTURES_ALONE[kind](root)
    with pytest.raises(HiveError, match="has no c"):
        convert(open_source(SourceOptions(str(path))), tmp_path / "out", ANY_REJECTS)
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"id": id, "caption": f"Of {id}."}) + "\n" for id in ids[:2]))
    given = ["--captions", str(captions), "--max-reject-share", "0.5", "--workers", "1"]
    if kind == "llava":
        given += ["--images", str(root)]
    assert main(["data", "convert", str(path), str(tmp_path / "new"), *given]) == 0
    samples = read_mds(tmp_path / "new")
    assert [(sample.id, sample.turns[1].content) for sample in samples] == [(id, f"Of {id}.") for id in ids[:2]]
    assert [sample.images for sample in samples] == [((root / f"{n}.jpg").read_bytes(),) for n in range(2)]
    assert "the file of captions has none for it" in (tmp_path / "new" / "rejects.jsonl").read_text()


@pytest.mark.parametrize("shuffle", [None, 1])
def test_no_picture_gets_the_caption_of_another(shuffle: int | None, tmp_path: Path) -> None:
    """Of pictures that share an id the first has the file's caption, as `recaption` writes it, and its equals do."""
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(encoded(photo(seed=ord(name)), "png"))
    shown = ["a.png", "b.png", "a.png", None, ["a.png", "b.png"]]
    rows = [{"id": "one", "image": name, "caption": "Old."} for name in shown] + [{"id": "two", "image": "b.png"}]
    rows += [{"id": "three", "image": "gone.png"}, {"id": "three", "image": "a.png"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    said = {"one": "Of a.", "two": "Of b.", "three": "Of what is gone."}
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"id": i, "caption": c}) + "\n" for i, c in said.items()))
    options = replace(ANY_REJECTS, captions=tmp_path / "new.jsonl", workers=2, part_size=2, shuffle_seed=shuffle)
    convert(LlavaSource(tmp_path / "a.json", tmp_path), tmp_path / "out", options)
    kept = [(sample.turns[1].content, sample.images) for sample in read_mds(tmp_path / "out")]
    a, b = ((tmp_path / f"{name}.png").read_bytes() for name in "ab")
    assert sorted(kept) == sorted([("Of a.", (a,)), ("Of a.", (a,)), ("Of b.", (b,))])
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    reasons = {reject["index"]: reject["reason"] for reject in rejects}
    assert reasons.keys() == {1, 3, 4, 6, 7}
    assert reasons[3] == "has no picture that its caption could be of"
    for index, first in ((1, 0), (4, 0), (7, 6)):
        assert reasons[index].startswith(f"has the id of number {first}, whose pictures are others or cannot be read")


def test_two_captions_of_one_id_are_refused(tmp_path: Path) -> None:
    """Where they differ; a file that holds lines twice says nothing else."""
    path = tmp_path / "captions.jsonl"
    path.write_text('\ufeff{"id": "a", "caption": "x"}\n{"id": 7, "caption": "y"}\n{"id": "a", "caption": "x"}\n')
    assert read_captions(path) == {"a": "x", "7": "y"}
    path.write_text(path.read_text() + '{"id": "7", "caption": "z"}\n')
    message = r"captions\.jsonl, line 4: another caption of id '7', which line 2 has; expected one an id$"
    with pytest.raises(HiveError, match=message):
        read_captions(path)


def test_captions_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """JSON may hold the other ends of lines that Unicode knows."""
    said = {"1": "one\u2028two\u0085three\x1cfour", "2": "five"}
    rows = [json.dumps({"id": id, "caption": text}, ensure_ascii=False) for id, text in said.items()]
    path = tmp_path / "captions.jsonl"
    path.write_bytes("\r\n".join(rows).replace("\x1c", "\\u001c").encode())
    assert read_captions(path) == said


@pytest.mark.parametrize("row", ['"caption": null', '"caption": ["a"]', '"caption": 3', '"id": null, "caption": "a"'])
def test_caption_that_is_no_text_is_named(row: str, tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"id": "1", "caption": "a"}\n{"id": "2", ' + row + "}\n")
    with pytest.raises(HiveError, match=r"captions.jsonl, line 2: expected \{'id', 'caption'\}.*text"):
        read_captions(path)
