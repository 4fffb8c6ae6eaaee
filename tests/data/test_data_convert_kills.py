"""Conversions that are killed, interrupted or meet another one: what they leave goes on to the same bytes."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path

import pytest
from corpus import make_source, tree
from tqdm import tqdm

from hive_ds.data.convert import convert
from hive_ds.data.convert_options import ConvertOptions
from hive_ds.data.schema import Sample
from hive_ds.data.sources.llava import LlavaSource
from hive_ds.errors import HiveError

pytest.importorskip("streaming", reason="needs mosaicml-streaming: pip install 'hive-ds[streaming]'")


def kill_and_go_on(source: LlavaSource, out: Path, options: ConvertOptions, rng: random.Random, longest: float) -> int:
    """Start the conversion and kill it (alone, or all its processes) until a start completes; kills that hit."""
    for kills in range(1000):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                tqdm.set_lock(threading.RLock())  # its own is shared with this process, which would wait for the dead
                with contextlib.redirect_stderr(io.StringIO()):
                    convert(source, out, options)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:  # this copy of the test must never return to pytest
                os._exit(code)
        with contextlib.suppress(PermissionError):  # the child has done so itself
            os.setpgid(pid, pid)
        time.sleep(rng.uniform(0, longest))
        if rng.random() < 0.5:
            os.kill(pid, signal.SIGKILL)
        else:
            os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        finished = (out / "index.json").is_file() and not out.with_name(f".{out.name}.partial").exists()
        if status == 0 or finished:  # or killed after its last step, before it ended
            return kills
        assert not out.exists() or (out / "index.json").is_file()
    raise AssertionError("never completed")


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.long)])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path: Path, kills: int) -> None:
    source, rng = make_source(tmp_path), random.Random(kills)
    options = ConvertOptions(workers=2, part_size=6)
    start = time.monotonic()
    convert(source, tmp_path / "straight", options)
    longest = 1.2 * (time.monotonic() - start)
    expected, hit, attempt = tree(tmp_path / "straight"), 0, 0
    while hit < kills:
        out = tmp_path / f"killed{attempt}"
        hit += kill_and_go_on(source, out, options, rng, longest)
        attempt += 1
        if not (out / "index.json").is_file():
            continue
        convert_again = tmp_path / f".{out.name}.partial"
        if convert_again.exists():  # killed between the last two steps
            convert(source, out, options)
        assert tree(out) == expected
        assert not convert_again.exists()


class SlowSource(LlavaSource):
    """A source that hangs at one of its samples, as a slow disk may, once it has made the file ``begun``."""

    begun: Path

    def read(self, index: int) -> Sample:
        """Sample ``index``, after a minute for one of them."""
        if index == 20:
            self.begun.touch()
            time.sleep(60)
        return super().read(index)


def test_ctrl_c_waits_for_no_part(tmp_path: Path) -> None:
    usual = make_source(tmp_path)
    source, out = SlowSource(tmp_path / "data.json", tmp_path / "images"), tmp_path / "out"
    source.begun = tmp_path / "begun"
    options = ConvertOptions(workers=2, part_size=6)

    def interrupt() -> None:
        while not source.begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it, as nohup does
    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 30
    for folder in (out, tmp_path / "straight"):
        convert(usual, folder, options)
    assert tree(out) == tree(tmp_path / "straight")


def test_killed_while_it_tidies_up_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill amid the removal of the working folder, whose files go in any order."""
    source, out, work = make_source(tmp_path), tmp_path / "out", tmp_path / ".out.partial"

    removed = shutil.rmtree

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if folder != work:
            return removed(folder, ignore_errors)
        (folder / "plan.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hive_ds.data.convert.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, ConvertOptions(workers=1))
    before = tree(out)
    assert work.is_dir()
    assert convert(source, out, ConvertOptions(workers=1)).samples == 59
    assert tree(out) == before
    assert not work.exists()
    with pytest.raises(HiveError, match="not an empty folder"):
        convert(source, out, ConvertOptions(workers=1))


def test_rejects_of_killed_starts_count(tmp_path: Path) -> None:
    """Each start stops at its first part, and the last one, which has none to convert, at the end."""
    source, options = make_source(tmp_path), ConvertOptions(workers=1, part_size=6, max_reject_share=0.0)
    work = tmp_path / ".out.partial"
    for parts in [*range(2, 11), 10]:  # number 7 is in the second
        with pytest.raises(HiveError, match=r"^1 of 60 samples were rejected, more than the share of 0\.0"):
            convert(source, tmp_path / "out", options)
        assert len(list((work / "records").iterdir())) == parts
        (work / "rejects.jsonl").unlink()  # as a kill leaves it


def test_two_conversions_to_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hive_ds.data.convert.LOCK_SECONDS", 0.2)
    source = make_source(tmp_path)
    from hive_ds.data import convert as module

    work = tmp_path / ".out.partial"
    work.mkdir()
    with module._locked(work), pytest.raises(HiveError, match=r"another conversion is writing it \(it holds .*lock\)"):
        convert(source, tmp_path / "out")
