"""Members of a tar that belong to one sample; images in a zip."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_data_sources import FILES, add

from hive_ds.data.sources import Columns, SourceOptions, open_source
from hive_ds.data.sources.stores import open_store
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


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members.items():
                file.writestr(name, data)
    else:
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                add(tar, name, data)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_what_macos_adds_hides_no_image(kind: str, tmp_path: Path) -> None:
    """Files beside the one folder that the images lie in, which were taken for files of the data set."""
    added = ("__MACOSX/images/._0.jpg", ".DS_Store") if kind == "zip" else ("./._images", "./images/._0.jpg")
    path = tmp_path / f"images.{kind}"
    members = {**dict.fromkeys(added, b"x"), "images/0.jpg": FILES["0.jpg"]}
    write_archive(path, members)
    store = open_store(path)
    assert store.read("0.jpg") == store.read("images/0.jpg") == FILES["0.jpg"]


def test_members_of_folders_in_a_tar_keep_apart(tmp_path: Path) -> None:
    """``./`` before a name, as tar writes it for a whole folder, changes nothing; images stand in order of suffix."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, file in {"./x.png": 0, "./x.jpg": 1, "./b/x.jpg": 2, "./c/x.jpg": 3}.items():
            add(tar, name, FILES[f"{file}.jpg"])
    source = open_source(SourceOptions(str(tmp_path / "a.tar")))
    assert [source.sample_id(at) for at in range(len(source))] == ["a/x", "a/b/x", "a/c/x"]
    assert [source.images(at) for at in range(3)] == [
        (FILES["1.jpg"], FILES["0.jpg"]),
        (FILES["2.jpg"],),
        (FILES["3.jpg"],),
    ]


def linked(tar: tarfile.TarFile, name: str, to: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    tar.addfile(member)


def test_a_hard_link_is_the_file_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As tar writes equal files that share an inode; the sample of another link has a caption and lost its image."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.jpg", FILES["0.jpg"])
        linked(tar, "b.jpg", "a.jpg", tarfile.LNKTYPE)
        linked(tar, "c.jpg", "b.jpg", tarfile.LNKTYPE)
        linked(tar, "d.jpg", "a.jpg", tarfile.SYMTYPE)
        for key in "abcd":
            add(tar, f"{key}.txt", f"Of {key}.".encode())
    source = open_source(SourceOptions(str(tmp_path)))
    for index in range(3):
        assert (source.read(index).images, source.images(index)) == ((FILES["0.jpg"],), (FILES["0.jpg"],))
    assert "d.jpg is a link to no earlier file and is left out" in caplog.text
    with pytest.raises(HiveError, match="has a caption and no image; --image-column none if text alone is meant"):
        source.read(3)
    alone = open_source(SourceOptions(str(tmp_path), columns=Columns(image="none")))
    assert [(alone.read(at).images, alone.read(at).turns[1].content) for at in (0, 3)] == [((), "Of a."), ((), "Of d.")]


def test_a_folder_of_tars_leaves_no_archive_out_unsaid(tmp_path: Path) -> None:
    for name, mode, image in [("a.tar", "w", "0.jpg"), ("b.TAR", "w", "1.jpg"), ("c.tar.gz", "w:gz", "2.jpg")]:
        with tarfile.open(str(tmp_path / name), mode) as tar:  # type: ignore[call-overload]
            add(tar, "x.jpg", FILES[image])
            add(tar, "x.txt", image.encode())
    with pytest.raises(HiveError, match=r"c\.tar\.gz is compressed; unpack it, or name the others by a pattern$"):
        open_source(SourceOptions(str(tmp_path)))
    (tmp_path / "c.tar.gz").rename(tmp_path / "c.tgz")
    with pytest.raises(HiveError, match=r"c\.tgz is compressed; unpack it, or name the others by a pattern$"):
        open_source(SourceOptions(str(tmp_path)))
    (tmp_path / "c.tgz").unlink()
    (tmp_path / "a.tar").rename(tmp_path / "a[0].tar")
    source = open_source(SourceOptions(str(tmp_path)))
    assert [source.read(index).turns[1].content for index in range(len(source))] == ["0.jpg", "1.jpg"]
    assert open_source(SourceOptions(str(tmp_path / "a[0].tar"))).images(0) == (FILES["0.jpg"],)


def test_tars_of_several_folders_give_ids_that_differ(tmp_path: Path) -> None:
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / "00000.tar", "w") as tar:
            add(tar, "x.jpg", FILES[f"{number}.jpg"])
    sources = [open_source(SourceOptions(str(tmp_path / place))) for place in ("", "*/*.tar", "a")]
    both = ["a/00000/x", "b/00000/x"]
    assert [source.sample_id(at) for source in sources for at in range(len(source))] == [*both, *both, "00000/x"]
    (tmp_path / "figure.jpg").write_bytes(FILES["2.jpg"])
    with pytest.raises(HiveError, match=r"holds images and a/00000\.tar; expected --format image_folder or webdataset"):
        open_source(SourceOptions(str(tmp_path)))
    chosen = [len(open_source(SourceOptions(str(tmp_path), kind))) for kind in ("webdataset", "image_folder")]
    assert chosen == [2, 1]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_top_folder_hides_no_member(kind: str, tmp_path: Path) -> None:
    """Of `t/t/0.jpg` and `t/0.jpg` the latter is what its own name says, and what both could be called."""
    images = {"t/t/0.jpg": FILES["0.jpg"], "t/0.jpg": FILES["1.jpg"]}
    path = tmp_path / f"images.{kind}"
    write_archive(path, images)
    store = open_store(path)
    assert {name: store.read(name) for name in (*images, "0.jpg")} == {**images, "0.jpg": FILES["1.jpg"]}


def test_conversations_that_are_asked_for_win_over_captions(tmp_path: Path) -> None:
    """As ``conversations`` does; under another name they were passed over."""
    talks = {name: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": name}] for name in ("a", "b")}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x.jpg", FILES["0.jpg"])
        add(tar, "x.txt", b"caption")
        add(tar, "x.json", json.dumps({"chat": talks["a"], "text": "other"}).encode())
        add(tar, "y.jpg", FILES["1.jpg"])
        add(tar, "y.txt", b"caption")
        add(tar, "y.json", json.dumps({"chat": "[]", "conversations": talks["b"]}).encode())
    for columns, said in (
        (Columns(conversations="chat"), ["a"]),
        (Columns(), ["caption", "b"]),
        (Columns(text="txt"), ["caption"] * 2),
    ):
        source = open_source(SourceOptions(str(tmp_path), columns=columns))
        assert [source.read(at).turns[1].content for at in range(len(said))] == said
    with pytest.raises(HiveError, match=r"^image column 'jpg': a source of format webdataset takes every image of a s"):
        open_source(SourceOptions(str(tmp_path), columns=Columns(image="jpg")))
    with pytest.raises(HiveError, match=r"^text column 'text' and conversations column 'chat': expected one of them$"):
        Columns(text="text", conversations="chat")
