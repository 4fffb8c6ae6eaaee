"""Rows of JSON that are broken, or begin in the middle of a conversation."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from corpus import encoded, photo, talk
from test_data_sources import add

from hive_ds.data.sources import SourceOptions, open_source
from hive_ds.data.sources.base import Columns, conversation
from hive_ds.errors import HiveError

BROKEN = ["{", pytest.param("[" * 10**6, id="nested without end")]


@pytest.mark.parametrize("row", BROKEN)
def test_a_line_that_is_no_json_is_a_bad_sample(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"caption": "A cat."}) + f"\n{row}\n")
    source = open_source(SourceOptions(str(tmp_path / "a.jsonl"), columns=Columns(image="none")))
    assert source.read(0).turns[1].content == "A cat."
    with pytest.raises(HiveError):
        source.read(1)


@pytest.mark.parametrize("text", BROKEN)
def test_conversations_that_are_no_json_are_named(text: str) -> None:
    with pytest.raises(HiveError, match="conversations are not JSON"):
        conversation(text)


def test_images_stand_before_the_first_question(tmp_path: Path) -> None:
    """Also where the assistant speaks first, as in ShareGPT's conversations that were cut."""
    image, (question, answer) = encoded(photo(seed=0), "png"), talk("Q", "A")
    (tmp_path / "0.png").write_bytes(image)
    rows = [{"image": "0.png", "conversations": turns} for turns in ([answer, question, answer], [answer])]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = open_source(SourceOptions(str(tmp_path / "a.json"), images=str(tmp_path)))
    assert [turn.content for turn in source.read(0).turns] == ["A", "<image>\nQ", "A"]
    with pytest.raises(HiveError, match=r"^has images and no user's turn that could show them$"):
        source.read(1)


@pytest.mark.parametrize("fields", BROKEN)
def test_fields_of_a_tar_that_are_no_json_are_named(tmp_path: Path, fields: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.json", b'{"caption": "A cat."}'), ("1.json", fields.encode())):
            add(tar, name, data)
    source = open_source(SourceOptions(str(tmp_path / "a.tar"), columns=Columns(image="none", text="caption")))
    assert source.read(0).turns[1].content == "A cat."
    with pytest.raises(HiveError, match=r"its \.json is not JSON"):
        source.read(1)
