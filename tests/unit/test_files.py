"""Folders that are there whole or not at all, by whatever name; and which names are those of folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hive_ds.errors import HiveError
from hive_ds.files import whole_folder, write_whole
from hive_ds.names import does_not_exist, names_folder


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    """As to a large disk; what it names may not be there yet."""
    (tmp_path / "empty").mkdir()
    for link, named in (("to empty", "empty"), ("to new", "new")):
        (tmp_path / link).symlink_to(named)
        with whole_folder(tmp_path / link) as aside:
            (aside / "file").write_text(link)
            assert not (tmp_path / named / "file").exists()
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / named / "file").read_text() == link
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new", "to empty", "to new"]


def test_what_cannot_be_replaced_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, mount, file = tmp_path / "here", tmp_path / "mount", tmp_path / "file"
    here.mkdir()
    mount.mkdir()
    file.touch()
    monkeypatch.chdir(here)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mount)
    for out, said in (
        (Path(), r"folder \.: is the current folder, which a finished folder cannot replace"),
        (Path("..", "here"), "here: is the current folder, "),
        (mount, "mount: is a mount point, .*; name a new one in it"),
        (file, "file: exists and is not an empty folder"),
        (tmp_path, "exists and is not an empty folder"),
    ):
        with pytest.raises(HiveError, match=said), whole_folder(out):
            raise AssertionError("the work has begun")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here", "mount"]


def test_a_folder_whose_work_fails_is_what_it_was(tmp_path: Path) -> None:
    def work(out: Path) -> None:
        with whole_folder(out) as aside:
            (aside / "file").touch()
            raise RuntimeError("planted")

    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with pytest.raises(RuntimeError, match="planted"):
            work(tmp_path / name)
    assert [(path.name, list(path.iterdir())) for path in tmp_path.iterdir()] == [("empty", [])]


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [
        *((name, False) for name in ("gpt2", "google/siglip-large-patch16-384", "a.b/c")),
        *((name, True) for name in ("runs/a/encoder", "./encoder", "../encoder", "/encoder", "~/encoder")),
    ],
)
def test_what_a_model_is_called_is_a_folder_or_a_name_on_the_hub(name: str, is_folder: bool) -> None:
    assert names_folder(name) == is_folder
    assert does_not_exist(name) == "does not exist"
    assert does_not_exist("runs/quickstart/data") == "does not exist; `make quickstart` makes it"


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(HiveError, match="is a folder; expected the name of a file to write"):
        write_whole(tmp_path, "text")
    write_whole(tmp_path / "new" / "file", "text")
    assert (tmp_path / "new" / "file").read_text() == "text"
