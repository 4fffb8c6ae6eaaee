"""Looking at folders of shards: each fault is found and named, and a sound folder has none."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_folders import write_columns, write_samples
from tiny_data import make_samples, png

from hive_ds.cli import main
from hive_ds.data.inspection.findings import NAMED
from hive_ds.data.inspection.text import TextSettings
from hive_ds.data.inspection.verify import VerifyReport, verify
from hive_ds.data.mds import write_mds
from hive_ds.data.mds.reading import open_folder
from hive_ds.data.mds.sizes import write_sizes
from hive_ds.data.schema import Sample, Turn, caption_sample, to_columns

NUMBER = 23


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_sound_folder_has_no_finding_and_stays_as_it_is(
    compression: str | None, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = make_samples(NUMBER)
    write_samples(tmp_path / "data", samples, compression=compression)
    before = contents(tmp_path / "data")
    assert any(name.endswith(".zstd") for name in before) == (compression == "zstd")
    assert list(open_folder(tmp_path / "data")) == samples
    assert main(["data", "verify", str(tmp_path / "data"), "--tokenizer", tokenizer]) == 0
    assert contents(tmp_path / "data") == before
    said = capsys.readouterr().out
    assert f"{NUMBER} samples in {len(open_folder(tmp_path / 'data').shards)} shards" in said
    assert f"{sum(len(sample.images) for sample in samples)} images" in said
    assert "FAULT" not in said
    assert "warning" not in said
    assert "\nSOUND: " in said


def edit_index(change: Callable[[list[dict]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        change(index["shards"])
        (folder / "index.json").write_text(json.dumps(index))

    return edit


def flip(file: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / file).read_bytes()
        assert old in data
        (folder / file).write_bytes(data.replace(old, new, 1))

    return edit


def change_sizes(folder: Path) -> None:
    sizes = np.load(folder / "sizes.npy")
    sizes[7, 1] += 1
    np.save(folder / "sizes.npy", sizes)


FILES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no index": (lambda folder: (folder / "index.json").unlink(), "index", "holds no index.json"),
    "broken index": (lambda folder: (folder / "index.json").write_text('{"version": 2'), "index", "cannot be read"),
    "empty index": (edit_index(list.clear), "index", "lists no samples"),
    "incomplete entry": (
        edit_index(lambda shards: shards[1].pop("column_names")),
        "index",
        "shard 1: has no column_names",
    ),
    "other columns": (edit_index(lambda shards: shards[0]["column_names"].sort(reverse=True)), "index", "has columns"),
    "outside": (edit_index(lambda s: s[0]["raw_data"].update(basename="../x")), "index", "basename is '../x'"),
    "unlisted shard": (edit_index(lambda shards: shards.pop()), "index", "is not listed in index.json"),
    "other count": (
        edit_index(lambda s: s[0].update(samples=s[0]["samples"] - 1)),
        "index",
        "samples, index.json says",
    ),
    "missing shard": (
        lambda folder: (folder / "part-1/shard.00000.mds").unlink(),
        "file",
        "part-1/shard.00000.mds: is missing",
    ),
    "cut shard": (flip("part-0/shard.00001.mds", b"assistant", b""), "file", "part-0/shard.00001.mds: has"),
    "flipped byte": (flip("part-0/shard.00000.mds", b"s000", b"s900"), "file", "part-0/shard.00000.mds: has sha256"),
    "no text": (
        flip("part-0/shard.00000.mds", b"s000", b"s\xff00"),
        "sample",
        "sample number 0 in shard part-0/shard.0",
    ),
    "other sizes": (change_sizes, "sizes", "sample 's007', shard part-0/shard.00"),
    "broken sizes": (flip("sizes.npy", b"(23,", b"((23,"), "sizes", "sizes.npy: cannot be read"),
    "pickled sizes": (
        lambda folder: (folder / "sizes.npy").write_bytes(pickle.dumps([(1, 1)])),
        "sizes",
        "sizes.npy: cannot be read",
    ),
    "fewer sizes": (lambda folder: write_sizes(folder, [(1, 1)]), "sizes", "expected (23, 2)"),
}


@pytest.mark.parametrize("fault", FILES)
def test_fault_of_files_is_found(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path / "data", make_samples(NUMBER))
    change, kind, says = FILES[fault]
    change(tmp_path / "data")
    assert main(["data", "verify", str(tmp_path / "data")]) == 1
    said = capsys.readouterr().out
    (headline,) = [line for line in said.splitlines() if line.startswith(f"FAULT {kind}:")]
    after = said[said.index(headline) :]
    assert says in after
    assert "NOT SOUND" in said


def row(sample: Sample, **changes: object) -> dict:
    return {**to_columns(sample), **changes}


GOOD = caption_sample("good", png(3), "a red square")
SAMPLES: dict[str, tuple[dict, str, str]] = {
    "image": (
        row(caption_sample("x", png(1)[:-30], "a")),
        "image",
        "'x', shard part-0/shard.00000.mds: image 0: image",
    ),
    "placeholders": (
        row(GOOD, turns=[{"role": "assistant", "content": "a"}]),
        "sample",
        "0 <image> in the text, but 1",
    ),
    "image sizes": (row(GOOD, image_sizes=[3]), "sample", "image_sizes sum to 3"),
    "turns": (row(GOOD, turns=3), "sample", "columns of another form (TypeError"),
    "empty id": (row(GOOD, id=""), "sample", "sample id ''"),
    "odd id": (row(GOOD, id=" x"), "id", "sample ' x', shard part-0/shard.00000.mds: odd id"),
    "unprintable id": (row(GOOD, id="x\x07"), "id", r"sample 'x\x07', shard"),
}


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("fault", SAMPLES)
def test_fault_of_a_sample_is_found_alone(fault: str, compression: str | None, tmp_path: Path) -> None:
    faulty, kind, says = SAMPLES[fault]
    write_columns(tmp_path / "data", [faulty, *map(to_columns, make_samples(22))], compression=compression)
    report = verify(tmp_path / "data")
    assert report.findings.counts == {kind: 1}
    assert says in str(report)
    assert not report.sound


def test_fault_of_a_compressed_shard_is_found(tmp_path: Path) -> None:
    write_samples(tmp_path / "data", make_samples(NUMBER), compression="zstd")
    file = tmp_path / "data/part-0/shard.00000.mds.zstd"
    file.write_bytes(file.read_bytes()[:-9])
    report = verify(tmp_path / "data")
    assert set(report.findings.counts) == {"file"}
    assert "shard.00000.mds.zstd cannot be decompressed" in str(report)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_damage_anywhere_ends_in_a_report(compression: str | None, tmp_path: Path) -> None:
    write_samples(tmp_path / "data", make_samples(12), compression=compression)
    drawn = random.Random(0)
    for file in [path for path in (tmp_path / "data").rglob("*") if path.is_file()]:
        whole = file.read_bytes()
        for change in (lambda at: b"\xff" * 4, lambda at: b"", lambda at: at * 2):
            for start in (0, *(drawn.randrange(len(whole) - 9) for _ in range(5))):
                end = start + drawn.randint(1, 9)
                file.write_bytes(whole[:start] + change(whole[start:end]) + whole[end:])
                report = verify(tmp_path / "data")
                assert str(report)
                # A number of the index that nothing reads, or bytes after the table of sizes, do no harm.
                assert not report.sound or file.suffix in (".json", ".npy")
        file.write_bytes(whole)


def test_what_cannot_be_checked_is_a_warning(tmp_path: Path) -> None:
    write_samples(tmp_path / "data", make_samples(9))
    (tmp_path / "data/sizes.npy").unlink()
    edit_index(lambda shards: [shard["raw_data"]["hashes"].clear() for shard in shards[:2]])(tmp_path / "data")
    report = verify(tmp_path / "data")
    assert report.sound
    assert [warning.split(",")[0] for warning in report.warnings] == [
        "there is no sizes.npy",
        "2 shard files have no sha256 in index.json",
    ]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_repeated_ids_are_a_warning(compression: str | None, tmp_path: Path) -> None:
    """LLaVA's own files have one id for every conversation about a picture."""
    samples = [replace(sample, id=f"s{number % 7}") for number, sample in enumerate(make_samples(NUMBER))]
    write_samples(tmp_path / "data", samples, compression=compression)
    report = verify(tmp_path / "data")
    assert report.sound
    (warning,) = report.warnings
    assert warning.startswith("16 samples have the id of an earlier one; the first is number 7, 's0', as number 0")


def test_report_names_a_few_counts_all_and_is_the_same_for_any_number_of_processes(
    tokenizer: str, tmp_path: Path
) -> None:
    many = range(0, 2 * NAMED + 2, 2)
    write_samples(tmp_path / "data", make_samples(60, bad=tuple(many)))
    settings = TextSettings(tokenizer, max_length=6)
    report = verify(tmp_path / "data", settings)
    assert report.findings.counts["image"] == sum(
        sum(image == b"not an image" for image in sample.images) for sample in make_samples(60, bad=tuple(many))
    )
    assert len(report.findings.named["image"]) == NAMED
    assert f"  and {report.findings.counts['image'] - NAMED} more" in str(report).splitlines()
    assert verify(tmp_path / "data", settings, workers=2) == report


def test_text_is_measured_as_training_reads_it(tokenizer: str, tmp_path: Path) -> None:
    samples = [caption_sample(f"short {index}", png(index), "red") for index in range(150)]
    long, conversation = "a square " * 40, (Turn("user", "<image>?"), Turn("assistant", "a"), Turn("assistant", "b"))
    samples += [caption_sample("long", png(1), long), Sample("two answers", conversation, (png(2),))]
    write_samples(tmp_path / "data", samples)
    report = verify(tmp_path / "data", TextSettings(tokenizer, max_length=10))
    assert report.sound
    assert (report.tokens.cut, report.tokens.lossless) == (1, 0)
    assert max(report.tokens.lengths) == 10
    # A caption's tokens all carry loss but the first, which starts the text.
    assert report.tokens.supervised == sum(report.tokens.lengths) - len(report.tokens.lengths)
    share = 100 * report.tokens.supervised / sum(report.tokens.lengths)
    assert f"tokens a sample; {share:.1f} % of them carry loss" in str(report)
    assert "1 x has N answers; template 'plain' is for captions (one), use 'chat'; first: sample 'two" in str(report)
    chat = verify(tmp_path / "data", TextSettings(tokenizer, template="chat", max_length=10))
    assert not chat.findings.counts
    assert not chat.sound  # the header of a turn alone is longer: no answer is left in most
    assert chat.tokens.lossless > 100
    assert f"warning: {chat.tokens.lossless} samples carry no loss at all" in str(chat)


def test_a_folder_is_sound_up_to_the_share_that_training_lets_pass() -> None:
    for refused, sound in ((0, True), (3, True), (4, False)):
        report = VerifyReport(Path("data"), None, samples=300, shards=1, bytes=1)
        for _ in range(refused):
            report.tokens.refuse("reason", 1, "sample")
        assert (report.refused, report.sound) == (refused, sound)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tokenizer", "{tmp}/none"], "tokenizer {tmp}/none: cannot be loaded"),
        (["--tokenizer", "{tmp}/none", "--template", "chatt"], "template 'chatt': expected one of plain, chat"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mds(make_samples(3), tmp_path / "data")
    assert main(["data", "verify", str(tmp_path / "data"), *(option.format(tmp=tmp_path) for option in options)]) == 2
    said = capsys.readouterr().err
    assert says.format(tmp=tmp_path) in said
    assert said.count("\n") == 1
