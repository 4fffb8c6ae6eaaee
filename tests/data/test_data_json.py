"""Sources whose JSON is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
