"""Checkpoints as files: kills at every write point, and the `hive-ds checkpoint` commands."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import start_rank
from full_disk import full_disk
from safetensors.torch import load_file
from tiny_data import make_image_processor, make_tokenizer
from tiny_models import tiny_hive
from write_points import stub_writer

from hive_ds.cli import main
from hive_ds.errors import HiveError
from hive_ds.processing import HiveProcessor
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint import newest_checkpoint, save_model
from hive_ds.training.checkpoint_files import aside_of, faults_of, publish, remove_old, step_folders
from hive_ds.training.checkpoint_tools import reshard
from hive_ds.training.distributed import World, start, stop


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """RUN/stage1 with two checkpoints, written by one rank."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
    start(World())
    folder = tmp_path / "run" / "stage1"
    writer = stub_writer(folder)
    for step in (100, 200):
        writer.begin(step, {"samples": step})
        assert writer.wait().failed is None
    yield folder
    stop()


def test_a_full_disk_at_the_hand_over_is_named_and_costs_no_model(stage: Path) -> None:
    """What has its name stays, and the next attempt writes over what is half there."""
    model, attempt = tiny_hive(), Attempt(stage, World())
    attempt.sign()
    engine: Any = SimpleNamespace(model=model, gather_state=model.state_dict)
    processor = HiveProcessor(make_image_processor(), make_tokenizer("llama3"))
    for _ in range(2):
        save_model(stage / "model", engine, processor, World(), attempt)
        before = {path.name: path.read_bytes() for path in (stage / "model").iterdir()}
        with full_disk(2000), pytest.raises(HiveError) as caught:
            save_model(stage / "model", engine, processor, World(), attempt)
        assert re.fullmatch(rf"{stage}/model: cannot be written \(.*File too large.*\); make room.*", str(caught.value))
        assert caught.value.exit_code == 1  # another try goes on, once there is room
        assert {path.name: path.read_bytes() for path in (stage / "model").iterdir()} == before


def test_whoever_reads_new_files_reads_the_weights(stage: Path) -> None:
    """safetensors 0.8 writes files that only their owner may read, which a group's shared run folder must not hold."""
    model, attempt = tiny_hive(), Attempt(stage, World())
    attempt.sign()
    engine: Any = SimpleNamespace(model=model, gather_state=model.state_dict)
    save_model(
        stage / "model", engine, HiveProcessor(make_image_processor(), make_tokenizer("llama3")), World(), attempt
    )
    before = os.umask(0o027)
    try:
        whole = stage / "checkpoints" / "step-000200"
        reshard(whole, stage / "two", 2)
        (stage / "new").touch()
    finally:
        os.umask(before)
    of_new = {path: access(path) for path in (stage / "two").iterdir()}
    assert set(of_new.values()) == {access(stage / "new")} == {0o640}
    (stage / "usual").touch()
    for folder in (whole, stage / "model"):
        assert {path: access(path) for path in folder.iterdir() if access(path) != access(stage / "usual")} == {}


def access(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_sigkill_at_every_write_point(tmp_path: Path) -> None:
    """Row 11: what has its name is whole, whenever the process is killed, and the next save clears the rest away."""
    output = tmp_path / "output"
    process = start_rank("write_points:main", [str(tmp_path)], os.environ, [output, output])
    process.join(400)
    assert process.exitcode == 0, output.read_text()
    points = sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
    assert points == list(range(1, len(points) + 1))
    seen = set()
    for point in points:
        killed, after = tmp_path / str(point) / "killed", tmp_path / str(point) / "after"
        folders = step_folders(killed)
        assert [faults_of(folder) for folder in folders] == [[]] * len(folders)
        assert (killed / "latest").read_text() in [folder.name for folder in folders]
        seen.add((tuple(int(folder.name[-1]) for folder in folders), (killed / "latest").read_text()[-1]))
        assert [folder.name[-1] for folder in step_folders(after)] in (["4", "3"], ["4", "2"])
        assert not list((after / "checkpoints").glob(".*"))
        assert [fault for folder in step_folders(after) for fault in faults_of(folder)] == []
    # Before the new one has its name; before `latest` names it; before the oldest goes; after that.
    assert seen == {((2, 1), "2"), ((3, 2, 1), "2"), ((3, 2, 1), "3"), ((3, 2), "3")}


@pytest.mark.parametrize(
    ("saved", "keep", "damaged", "left"),
    [
        (300, 2, (), (150, 250, 300)),
        (300, 2, (250,), (150, 200, 250, 300)),
        (300, 3, (100, 200), (150, 200, 250, 300)),
        (300, 3, (50, 100, 150, 250), (50, 100, 150, 200, 250, 300)),
        (250, 1, (300,), (150, 250, 300)),
        (150, 2, (200, 250, 300), (100, 150, 200, 250, 300)),
        (150, 2, (), (100, 150, 200, 250, 300)),
    ],
)
def test_damaged_checkpoints_push_no_whole_one_out(
    saved: int, keep: int, damaged: tuple[int, ...], left: tuple[int, ...], tmp_path: Path
) -> None:
    """There are steps 50, 100, ... 300, of which 150 and 300 are for good; ``saved`` has just been written."""
    folders = {step: tmp_path / "checkpoints" / f"step-{step:06d}" for step in range(50, 301, 50)}
    for step, folder in folders.items():
        aside = aside_of(folder)
        aside.mkdir(parents=True)
        (aside / "pieces").write_text("1" if step in damaged else "12")
        publish(aside, folder, {"pieces": {"bytes": 2, "sha256": "not read"}})
    (tmp_path / "checkpoints" / "step-000050.bak").mkdir()  # a person's own
    remove_old(tmp_path, saved, keep, keep_every=150)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == sorted(["step-000050.bak", *(folders[step].name for step in left)])


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"rank-00000.pt": 7}'])
def test_a_manifest_that_names_nothing_makes_no_checkpoint(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert len(faults_of(tmp_path)) == 1


def test_damaged_checkpoints_alone_end_the_run(stage: Path) -> None:
    """They may be readable again later; a stage that began at step 0 would lose its metrics, and train anew."""
    folders = step_folders(stage)
    for folder in folders:
        (folder / "rank-00000.pt").unlink()
    faults = "; ".join(f"{folder.name}: rank-00000.pt is missing" for folder in folders)
    wanted = f"{stage}/checkpoints: no checkpoint is complete ({faults}); copy one back, or remove these folders"
    with pytest.raises(HiveError, match=re.escape(wanted)):
        newest_checkpoint(stage, World(), print)


def test_list_and_verify(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stage.parent
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{stage}/checkpoints/step-000{n}00: whole" for n in (1, 2)]
    newest = stage / "checkpoints" / "step-000200"
    (newest / "rank-00000.pt").unlink()
    pieces = newest / "pieces-00000.safetensors"
    pieces.write_bytes(pieces.read_bytes()[:-1] + b"x")
    assert main(["checkpoint", "verify", str(newest)]) == 2
    faults = ["pieces-00000.safetensors has been changed (another SHA-256)", "rank-00000.pt is missing"]
    assert capsys.readouterr().out.splitlines() == [f"{newest}: {fault}" for fault in faults]
    (stage / "checkpoints" / "step-000300").mkdir()
    (stage / "checkpoints" / "step-000100.bak").mkdir()
    assert main(["checkpoint", "list", str(run)]) == 0
    title, empty, broken, whole = capsys.readouterr().out.splitlines()
    assert title == str(stage)
    assert "? ranks, ZeRO ?  not whole: no readable manifest.json" in empty
    assert f"in 3 files  1 ranks, ZeRO 3  not whole: {'; '.join(faults)}" in broken
    assert whole.startswith("  step-000100  20")
    assert whole.endswith("in 4 files  1 ranks, ZeRO 3  whole, a resume takes this one")


def test_reshard_moves_every_number(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = stage / "checkpoints" / "step-000200"
    assert main(["checkpoint", "reshard", str(source), f"{tmp_path}/four", "--ranks", "4"]) == 0
    four = tmp_path / "four"
    assert faults_of(four) == []
    shares = [load_file(path) for path in sorted(four.glob("pieces-*"))]
    # 15 elements in fours, 7 in twos: the last part of each is short.
    assert [len(share["exp_avg/a.weight"]) for share in shares] == [4, 4, 4, 3]
    assert [len(share["weight/b.bias"]) for share in shares] == [2, 2, 2, 1]
    assert json.loads((four / "state.json").read_text()) == json.loads((source / "state.json").read_text())
    assert main(["checkpoint", "reshard", str(four), f"{tmp_path}/one", "--ranks", "1"]) == 0
    for name in ("pieces-00000.safetensors", "rank-00000.pt", "state.json"):
        assert (tmp_path / "one" / name).read_bytes() == (source / name).read_bytes(), name
    (four / "pieces-00002.safetensors").unlink()
    capsys.readouterr()
    assert main(["checkpoint", "reshard", str(four), f"{tmp_path}/two", "--ranks", "2"]) == 2
    assert "four is not whole: pieces-00002.safetensors is missing" in capsys.readouterr().err
    assert main(["checkpoint", "reshard", str(source), f"{tmp_path}/one", "--ranks", "2"]) == 2
    assert f"{tmp_path}/one: exists" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_commands_do_without_deepspeed(stage: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from hive_ds.cli import main\n"
        f"assert main(['checkpoint', 'list', {str(stage.parent)!r}]) == 0\n"
        f"source = {str(stage / 'checkpoints' / 'step-000100')!r}\n"
        f"assert main(['checkpoint', 'reshard', source, {str(tmp_path / 'out')!r}, '--ranks', '2']) == 0\n"
        "assert not {'deepspeed', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
