"""Sources -> MDS shards: nothing good is lost, everything bad is named, whatever the processes and the kills."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from corpus import encoded, good_files, make_source, photo, tree, write_corpus
from PIL import Image

from hive_ds.cli import main
from hive_ds.data.convert import convert
from hive_ds.data.convert_images import ImageOptions
from hive_ds.data.convert_options import ConvertOptions
from hive_ds.data.sources.llava import LlavaSource
from hive_ds.errors import HiveError

pytest.importorskip("streaming", reason="needs mosaicml-streaming: pip install 'hive-ds[streaming]'")
from hive_ds.data.mds import read_mds
from hive_ds.data.mds.sizes import read_sizes

ANY_REJECTS = ConvertOptions(workers=1, max_reject_share=1.0)


def test_bad_samples_are_named_and_good_ones_kept(tmp_path: Path) -> None:
    path, images, reasons = write_corpus(tmp_path)
    assert len(reasons) >= 25
    out = tmp_path / "out"
    summary = convert(LlavaSource(path, images), out, ANY_REJECTS)
    kept = {sample.id: sample for sample in read_mds(out)}
    assert kept.keys() == {"good/text", *(f"good/{name}" for name in good_files())}
    for name, data in good_files().items():
        assert kept[f"good/{name}"].images == (data,), name
    rows = json.loads(path.read_text())
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {reject["id"] for reject in rejects} == reasons.keys()
    for reject in rejects:
        assert re.search(reasons[reject["id"]], reject["reason"]), reject
        assert len(reject["reason"]) <= 300
        assert rows[reject["index"]] == "not a sample" or rows[reject["index"]]["id"] == reject["id"]
    assert (summary.samples, summary.rejected) == (len(kept), len(reasons))
    assert summary.image_bytes == summary.source_image_bytes == sum(map(len, good_files().values()))
    assert read_sizes(out, len(kept))[:, 1].tolist() == [len(sample.images) for sample in read_mds(out)]


@pytest.mark.parametrize("shuffle", [None, 3])
def test_output_does_not_depend_on_the_number_of_processes(tmp_path: Path, shuffle: int | None) -> None:
    source = make_source(tmp_path)
    trees = []
    for workers in (1, 2, 5):
        options = ConvertOptions(workers=workers, part_size=8, shuffle_seed=shuffle, compression="zstd")
        convert(source, tmp_path / f"out{workers}", options)
        trees.append(tree(tmp_path / f"out{workers}"))
    assert trees[0] == trees[1] == trees[2]
    ids = [sample.id for sample in read_mds(tmp_path / "out1")]
    straight = [str(n) for n in range(60) if n != 7]
    assert (ids == straight) if shuffle is None else (ids != straight and sorted(ids) == sorted(straight))


def test_unknown_compression_is_named(tmp_path: Path) -> None:
    with pytest.raises(HiveError, match=r"compression 'foo': expected one of br, bz2, .*zstd"):
        convert(make_source(tmp_path), tmp_path / "out", ConvertOptions(compression="foo"))
    assert not (tmp_path / "out").exists()


def test_a_link_is_kept_and_written_through(tmp_path: Path) -> None:
    """To an empty folder or to none; it was found out when all was converted, and again at every start."""
    source = make_source(tmp_path)
    (tmp_path / "disk").mkdir()
    for name, to in (("link", "disk"), ("dangling", "none")):
        (tmp_path / name).symlink_to(to)
        assert convert(source, tmp_path / name, ConvertOptions(workers=1)).samples == 59
        assert (tmp_path / name).readlink() == Path(to)
        assert len(read_mds(tmp_path / to)) == 59
        assert not list(tmp_path.glob(".*"))
        with pytest.raises(HiveError, match=rf"output {tmp_path / to}: exists and is not an empty folder"):
            convert(source, tmp_path / name, ConvertOptions(workers=1))


def test_other_options_do_not_go_on_with_what_was_begun(tmp_path: Path) -> None:
    source, out = make_source(tmp_path), tmp_path / "out"
    strict = ConvertOptions(workers=1, part_size=10, max_reject_share=0.0)
    with pytest.raises(HiveError, match=r"1 of 60 samples were rejected, more than the share of 0\.0.*; the first, 7"):
        convert(source, out, strict)
    assert not out.exists()
    others: dict[str, Any] = {"shuffle_seed": 1, "part_size": 20, "limit": 30, "compression": "zstd"}
    for name, value in {**others, "images": ImageOptions(resize=32)}.items():
        was = re.escape(f"{asdict(strict)[name]!r}, not ")
        with pytest.raises(HiveError, match=rf"begun there with {name} {was}.*; give the same options"):
            convert(source, out, replace(strict, **{name: value}))
    assert convert(source, out, replace(strict, max_reject_share=0.5)).samples == 59


def convert_table(root: Path, *options: str) -> int:
    command = ["data", "convert", str(root / "x.csv"), str(root / "out"), "--images", str(root / "images")]
    return main([*command, "--part-size", "10", *options])


def write_table(root: Path) -> None:
    make_source(root)
    rows = [f"{n}.jpg,{n}.png,alt {n},caption {n}\n" for n in range(60)]
    (root / "x.csv").write_text("".join(["image,other,alt,caption\n", *rows]))


OTHER_SOURCE = {
    ("--text-column", "caption"): "text column 'alt', not 'caption'",
    ("--image-column", "other"): "image column 'image', not 'other'",
    ("--id-column", "caption"): "id column None, not 'caption'",
    ("--images", "{root}"): "source images '{root}/images', not '{root}'",
}


@pytest.mark.parametrize("given", OTHER_SOURCE, ids=lambda given: given[0])
def test_other_texts_and_images_do_not_go_on_with_what_was_begun(
    given: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path)
    begun = ("--text-column", "alt", "--max-reject-share", "0")
    assert convert_table(tmp_path, *begun) == 2
    assert convert_table(tmp_path, *begun, given[0], given[1].format(root=tmp_path)) == 2
    said, work = capsys.readouterr().err, tmp_path / ".out.partial"
    assert f"to give other options, remove {work} first" in said
    assert f"begun there with {OTHER_SOURCE[given].format(root=tmp_path)}; give the same options" in said
    assert f"or remove {work} to start anew" in said
    assert not (tmp_path / "out").exists()


def test_a_source_written_anew_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its number of samples, first and last are the same; another folder to start in makes no difference."""
    write_table(tmp_path)
    assert convert_table(tmp_path, "--max-reject-share", "0") == 2
    table = tmp_path / "x.csv"
    kept = table.stat()
    table.write_text(table.read_text().replace("caption 30", "another 30"))
    assert convert_table(tmp_path, "--workers", "1") == 2
    assert re.search(
        r"begun there with source files '1 of \d+ bytes, changed 20.*', not '1 of", capsys.readouterr().err
    )
    table.write_text(table.read_text().replace("another 30", "caption 30"))
    os.utime(table, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    monkeypatch.chdir(tmp_path)
    assert convert_table(Path(), "--workers", "1") == 0


@pytest.mark.parametrize("missing", [[30], range(60)], ids=["some", "all"])
def test_rejects_that_stopped_a_conversion_are_read_again(missing: Iterable[int], tmp_path: Path) -> None:
    source, images = make_source(tmp_path), tmp_path / "images"
    for number in missing:
        (images / f"{number}.jpg").rename(images / f"{number}.away")
    options = ConvertOptions(workers=2, part_size=10, max_reject_share=0.02 if len(list(missing)) == 1 else 1.0)
    for _ in range(2):
        with pytest.raises(HiveError, match=r"of 60 samples were rejected.*reads them again and goes on"):
            convert(source, tmp_path / "out", options)
    listed = (tmp_path / ".out.partial" / "rejects.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in listed} == {"7", *map(str, missing)}
    for path in images.glob("*.away"):
        path.rename(path.with_suffix(".jpg"))
    assert convert(source, tmp_path / "out", options).samples == 59
    convert(source, tmp_path / "straight", options)
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_parts_without_rejects_are_not_read_again(tmp_path: Path) -> None:
    """Hours may be in them."""
    source, images = make_source(tmp_path), tmp_path / "images"
    options = ConvertOptions(workers=1, part_size=6, max_reject_share=0.0)  # number 7 is in the second part
    with pytest.raises(HiveError, match=r"1 of 60 samples were rejected"):
        convert(source, tmp_path / "out", options)
    (images / "0.jpg").unlink()
    (images / "7.jpg").write_bytes((images / "8.jpg").read_bytes())
    assert convert(source, tmp_path / "out", options).samples == 60


@pytest.mark.parametrize("damage", ["", "[1]", "{}"])
@pytest.mark.parametrize("name", ["plan.json", "records/part-00003.json"])
def test_damaged_files_of_a_begun_conversion_are_named(name: str, damage: str, tmp_path: Path) -> None:
    source, options = make_source(tmp_path), ConvertOptions(workers=1, part_size=10, max_reject_share=0.0)
    with pytest.raises(HiveError, match="were rejected"):
        convert(source, tmp_path / "out", options)
    work = tmp_path / ".out.partial"
    (work / name).write_text(damage)
    kept = tree(work)
    fault = "begun there with" if (name, damage) == ("plan.json", "{}") else f"{work / name}: .*; expected the "
    with pytest.raises(HiveError, match=fault):
        convert(source, tmp_path / "out", options)
    assert tree(work) == kept


def test_damaged_summary_of_a_killed_conversion_is_named(tmp_path: Path) -> None:
    source, out, work = make_source(tmp_path), tmp_path / "out", tmp_path / ".out.partial"
    convert(source, out, ANY_REJECTS)
    work.mkdir()
    (out / "summary.json").write_text("{")
    with pytest.raises(HiveError, match=r"summary\.json: .*; expected the summary of a conversion"):
        convert(source, out, ANY_REJECTS)
    assert work.is_dir(), "the one sign that this command was at work there"


def test_images_are_shrunk_and_encoded_anew(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    big = encoded(photo(120, 90), "png")
    (tmp_path / "images" / "0.jpg").write_bytes(big)
    (tmp_path / "images" / "1.jpg").write_bytes(encoded(photo(120, 90), "jpeg", exif=exif_turned()))
    options = ConvertOptions(workers=1, images=ImageOptions(resize=45, format="webp"))
    summary = convert(source, tmp_path / "out", options)
    images = {sample.id: Image.open(io.BytesIO(sample.images[0])) for sample in read_mds(tmp_path / "out")}
    assert (images["0"].size, images["0"].format) == ((60, 45), "WEBP")
    assert (images["1"].size, images["1"].getexif().get(0x0112)) == ((45, 60), None)
    assert images["2"].size == (40, 30)
    assert summary.image_bytes < summary.source_image_bytes
    less = 1 - summary.image_bytes / summary.source_image_bytes
    said = rf", {less:.0%} less than the source's\); 1 rejected, listed in rejects.jsonl; decode took .* encode took"
    assert re.search(said, str(summary))


def exif_turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_what_to_do_next_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_source(tmp_path)
    given = [str(tmp_path / "data.json"), str(tmp_path / "my data"), "--images", str(tmp_path / "images")]
    assert main(["data", "convert", *given, "--workers", "1"]) == 0
    following = re.search(r"^next: hive-ds (data verify .*), then train", capsys.readouterr().out, re.M)
    assert following
    assert main(shlex.split(following[1])) == 0
    assert f"data.train='{tmp_path}/my data';" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("workers", [1, 2])
def test_fault_of_the_machine_is_no_reject(
    workers: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops the conversion, which then goes on."""
    source, options = make_source(tmp_path), ConvertOptions(workers=workers, part_size=8)
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "30.jpg":
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(HiveError, match=rf"sample 30: .*{os.strerror(number)}.*run the same command to go on"):
            convert(source, tmp_path / "out", options)
    assert (tmp_path / ".out.partial" / "records" / "part-00000.json").is_file()
    assert convert(source, tmp_path / "out", options).samples == 59
    convert(source, tmp_path / "straight", options)
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("nothing_left")
def test_nothing_but_rejects_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"id": "1", "conversations": []}\n')
    with pytest.raises(HiveError, match=r"1 of 1 samples were rejected, so none is left to write"):
        convert(LlavaSource(tmp_path / "data.jsonl"), tmp_path / "out", ANY_REJECTS)


def test_full_output_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_source(tmp_path)
    command = ["data", "convert", str(tmp_path / "data.json"), str(tmp_path / "out"), "--images"]
    assert main([*command, str(tmp_path / "images"), "--workers", "2", "--part-size", "20"]) == 0
    assert "59 samples, 59 images" in capsys.readouterr().out
    before = tree(tmp_path / "out")
    assert main([*command, str(tmp_path / "images")]) == 2
    assert "exists and is not an empty folder; name a new one" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before
    assert main([*command, str(tmp_path / "nowhere")]) == 2
    assert "nowhere: does not exist; expected a folder, a .zip or a .tar" in capsys.readouterr().err
